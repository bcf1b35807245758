"""The section "Records" of docs/data-format.md and the keys of docs/languages-file.md, made from the types.

    python -m tests.support.records_page

It writes the sections between two markers. Each type's text and the meaning of its fields are its docstring, or those
of its fields.
"""

import dataclasses
import importlib
import inspect
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from moelpr.base.files import write_text
from moelpr.base.records import Record
from moelpr.project.project import Project

ROOT = Path(__file__).parents[2]
START, END = "<!-- records: made by python -m tests.support.records_page -->", "<!-- end of records -->"
_PACKAGES = ("moelpr", "checkpoint_convert", "data_tools", "examples")
# Files that users read or write, whose fields are listed; other records get a line.
_SHOWN = {
    "PREFIX.manifest.json": "moelpr.data.manifest:Manifest",
    "calibration.json": "checkpoint_convert.conversions.routed_model:RoutedModel",
    "pack.json": "checkpoint_convert.conversions.packs:Pack",
    "results.json and routing.json of an evaluation": "moelpr.measure.report.evaluation_files:EvaluationFile",
    "--dataset-info, an entry": "data_tools.preprocessing.registry:_Entry",
    "--tasks, an entry": "moelpr.measure.evaluate.benchmarks:Benchmark",
}
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}


class Description(NamedTuple):
    """A docstring: the text before its sections, and the text of each attribute."""

    text: str
    attributes: dict[str, str]


def record_types() -> list[type[Record]]:
    """All records of the library, sorted by file name; a module defines some if its text names their base class."""
    for package in _PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "(Record)" in path.read_text():
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    actual = [kind for kind in Record.__subclasses__() if kind.__module__.split(".")[0] in _PACKAGES]
    return sorted(actual, key=lambda kind: kind.FILE_NAME)


def section() -> str:
    """The section in Markdown, with its markers."""
    parts = [START, "## Records"]
    shown: set[Any] = set()
    parts += [_described(name, resolve_name(place), shown) for name, place in _SHOWN.items()]
    lines = [
        f"| `{kind.FILE_NAME}` | {describe(kind).text} (`{kind.__module__.replace('.', '/')}.py`) |"
        for kind in record_types()
        if kind not in shown and not kind.__module__.startswith("examples.")
    ]
    return "\n\n".join([*parts, "### Other files", "\n".join(["| file | contents |", "|---|---|", *lines]), END])


def keys() -> str:
    """The keys of languages.yaml in Markdown, with markers."""
    places: dict[Any, list[str]] = {}
    for place, kind in _places(Project):
        places.setdefault(kind, []).append(place)
    parts = [START, "## Keys", _keys_table(Project)]
    for kind, names in places.items():
        parts += [f"### {', '.join(names)}", *([describe(kind).text] if describe(kind).text else []), _keys_table(kind)]
    return "\n\n".join([*parts, END])


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / "docs" / "data-format.md": section,
    ROOT / "docs" / "languages-file.md": keys,
}


def current(page: Path) -> str:
    """A page with its section as it should be."""
    before, _, rest = page.read_text().partition(START)
    return before + PAGES[page]() + rest.partition(END)[2]


def _described(title: str, kind: Any, shown: set[Any]) -> str:
    """The paragraphs about a type of file, and about the types of its fields that are not in `shown`, which grows."""
    parts = [f"### {title}", describe(kind).text, _table(kind)]
    for part in _nested(kind):
        if part not in shown:
            parts += [f"**{type_name(part)}**: {describe(part).text}", _table(part)]
    shown.update([kind, *_nested(kind)])
    return "\n\n".join(parts)


def _table(kind: Any) -> str:
    meanings = describe(kind).attributes
    rows = [
        f"| `{name}` | {type_name(hint)} | {meanings.get(name, '')} |"
        for name, hint in get_type_hints(kind).items()
        if name != "format_version" and not name.isupper()
    ]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _places(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys below which there are keys of another type, and this type."""
    for name, hint in get_type_hints(kind).items():
        below = next(iter(part for part in _parts(hint) if dataclasses.is_dataclass(part)), None)
        if below:
            is_mapping = any(get_origin(part) is dict for part in _parts(hint))
            place = f"{prefix}{name}.CODE" if is_mapping else f"{prefix}{name}"
            yield place, below
            yield from _places(below, f"{place}.")


def _parts(hint: Any) -> Iterator[Any]:
    """A type, and the types that it is composed of."""
    yield hint
    for argument in get_args(hint):
        yield from _parts(argument)


def _keys_table(kind: Any) -> str:
    meanings, hints = describe(kind).attributes, get_type_hints(kind)
    rows = [
        f"| `{field.name}` | {_value(hints[field.name])} | {_default(field)} | {meanings[field.name]} |"
        for field in dataclasses.fields(kind)
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _value(hint: Any) -> str:
    """The values that a key of YAML takes; an optional key need not be null."""
    if any(dataclasses.is_dataclass(part) for part in _parts(hint)):
        return "mapping"
    return type_name(hint).replace(" or null", "").replace("object of", "mapping of")


def _default(field: Any) -> str:
    """The default of a key; empty if it is null or has keys of its own, about which other lines inform."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = getattr(field.default, "default", field.default)  # pydantic has a description of a field
    return "" if value in (None, dataclasses.MISSING) else f"`{value:g}`" if type(value) is float else f"`{value}`"


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
        return " or ".join(type_name(part) for part in arguments if part is not int or float not in arguments)
    if origin in (list, tuple):
        part = type_name(arguments[0])
        return f"list of ({part})" if " or " in part else f"list of {part}"
    if origin is Counter:
        return "object of integer"
    if isinstance(origin, type) and issubclass(origin, dict):
        return f"object of {type_name(arguments[-1])}"
    return getattr(hint, "__name__", str(hint)).lstrip("_")


def _nested(kind: Any) -> list[Any]:
    """The types of fields that have fields of their own, in the order of the fields."""
    actual: dict[Any, None] = {}

    def visit(hint: Any) -> None:
        if dataclasses.is_dataclass(hint) or is_typeddict(hint) or hasattr(hint, "_fields"):
            actual[hint] = None
            actual.update(dict.fromkeys(_nested(hint)))
        for argument in get_args(hint):
            visit(argument)

    for name, hint in get_type_hints(kind).items():
        if not name.isupper():
            visit(hint)
    return list(actual)


def describe(kind: Any) -> Description:
    """Read the docstring of a type with fields, or the docstrings of its fields."""
    if described := {name: one.description for name, one in getattr(kind, "__pydantic_fields__", {}).items()}:
        if any(described.values()):
            text = _line(inspect.getdoc(kind) or "")
            meanings = {name: _line(meaning or "") for name, meaning in described.items()}
            return Description("" if text.startswith(f"{kind.__name__}(") else text, meanings)
    text, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    actual = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", attributes, flags=re.MULTILINE)
    return Description(_line(text), {name: _line(meaning) for name, meaning in actual})


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for page in PAGES:
        write_text(page, current(page))
