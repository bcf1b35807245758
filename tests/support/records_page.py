"""The section "Records" of docs/data-format.md, made from the types.

    python -m tests.support.records_page

It writes the section between two markers. Each record's text and the meaning of its fields are its docstring.
"""

import dataclasses
import importlib
import inspect
import re
import types
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from moelpr.store.files import write_text
from moelpr.store.records import Record

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "data-format.md"
START, END = "<!-- records: made by python -m tests.support.records_page -->", "<!-- end of records -->"
_PACKAGES = ("moelpr", "checkpoint_convert", "data_tools")
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}


class Description(NamedTuple):
    """What a docstring says: the text before its sections, and the text of each attribute."""

    text: str
    attributes: dict[str, str]


def record_types() -> list[type[Record]]:
    """All records of the library, sorted by file name; a module defines some if its text names their base class."""
    for package in _PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "(Record)" in path.read_text():
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = [kind for kind in Record.__subclasses__() if kind.__module__.split(".")[0] in _PACKAGES]
    return sorted(found, key=lambda kind: kind.FILE_NAME)


def section() -> str:
    """The section in Markdown, with its markers."""
    intro = (
        "Every JSON file below has a `format_version`, 1 unless another one is named; a file without it has version 1. "
        "A reader accepts its own version only, and refuses unknown fields and wrong types in one sentence."
    )
    return "\n\n".join([START, "## Records", fill(intro, 120), *map(_record, record_types()), END])


def current_page() -> str:
    """The page with the section as it should be."""
    before, _, rest = PAGE.read_text().partition(START)
    return before + section() + rest.partition(END)[2]


def _record(kind: type[Record]) -> str:
    version = f" Version {kind.VERSION}." if kind.VERSION != 1 else ""
    described = describe(kind)
    place = f"`{kind.__module__.replace('.', '/')}.py`"
    parts = [f"### {kind.FILE_NAME}", fill(f"{described.text}{version} ({place})", 120), _table(kind)]
    for part in _nested(kind):
        parts += [fill(f"**{part.__name__}**: {describe(part).text}", 120), _table(part)]
    return "\n\n".join(parts)


def _table(kind: Any) -> str:
    meanings = describe(kind).attributes
    rows = [
        f"| `{name}` | {type_name(hint)} | {meanings.get(name, '')} |"
        for name, hint in get_type_hints(kind).items()
        if name != "format_version" and not name.isupper()
    ]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def type_name(hint: Any) -> str:
    """A type in the words of JSON."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value).lower() for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    if origin in (list, tuple):
        return f"list of {type_name(arguments[0])}"
    if origin is not None and issubclass(origin, dict):
        return f"object of {type_name(arguments[-1])}"
    return getattr(hint, "__name__", str(hint))


def _nested(kind: Any) -> list[Any]:
    """The types of fields that have fields of their own, in the order of the fields."""
    found: dict[Any, None] = {}

    def visit(hint: Any) -> None:
        if dataclasses.is_dataclass(hint) or is_typeddict(hint) or hasattr(hint, "_fields"):
            found[hint] = None
            found.update(dict.fromkeys(_nested(hint)))
        for argument in get_args(hint):
            visit(argument)

    for name, hint in get_type_hints(kind).items():
        if not name.isupper():
            visit(hint)
    return list(found)


def describe(kind: Any) -> Description:
    """Read the docstring of a type with fields."""
    text, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", attributes, flags=re.MULTILINE)
    return Description(_line(text), {name: _line(meaning) for name, meaning in found})


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    write_text(PAGE, current_page())
