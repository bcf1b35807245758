"""Read and write YAML. No other module imports yaml."""

import re
from pathlib import Path
from typing import Any

import yaml

from moelpr.base.errors import UserError, first_line

_MOST_VALUES, _LARGEST = 1_000_000, 10**30


# The C loader reads a run's settings ten times as fast, but some builds of PyYAML lack it.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Rejects a key that a mapping has twice, of which YAML keeps the last; 0123 and 24:00:00 are text, not numbers."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        return node.value if re.match(r"0\d|.*:", node.value) else super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a file that contains a YAML mapping; messages call it `what`, such as "recipe"."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read the {what} {path}: {reason}; pass an existing file of UTF-8 text") from error
    return parse_mapping(text, f"{what} {path}")


def parse_mapping(text: str, what: str) -> dict[str, Any]:
    """Parse a YAML mapping; messages call its origin `what`."""
    try:
        content = yaml.load(text, Loader=_Loader)
        _check_size(content)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        mark, start = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        since = f" or line {start.line + 1}" if mark and start and start.line < mark.line else ""
        here = text.split("\n")[mark.line :] if mark else []  # empty if the text ends too early
        if mark and here and here[0][mark.column :].startswith("\t"):
            reason, since = "a tab; indent with spaces", ""
        raise UserError(f"the {what} is not valid YAML{place} ({reason}); fix that line{since}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"the {what} must have lines KEY: VALUE, got {'nothing' if content is None else repr(content)[:40]}"
        )
    return content


def key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """The line of each key and list item of a YAML text that `parse_mapping` accepts: path to it → line, from 1."""
    lines: dict[tuple[str | int, ...], int] = {}

    def visit(node: yaml.Node | None, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            children = [(key.value, key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            children = [(number, item, item) for number, item in enumerate(node.value)]
        else:
            return
        for name, place, child in children:
            lines[*path, name] = place.start_mark.line + 1
            visit(child, (*path, name))

    visit(yaml.compose(text, Loader=_Loader), ())
    return lines


def _check_size(content: Any) -> None:
    """ValueError for what would take long or fail to be printed: aliases that multiply or recur, and huge numbers."""
    sizes: dict[int, int] = {}  # id of a list or mapping -> its values with all of theirs; 0 while it is counted

    def size(value: Any) -> int:
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError("a number is too large")
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = 0
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size, parts))
        if not 0 < sizes[id(value)] <= _MOST_VALUES:
            raise ValueError(f"aliases make it endless, or longer than {_MOST_VALUES:,} values")
        return sizes[id(value)]

    size(content)


def dump(content: Any, sort_keys: bool = False) -> str:
    """YAML text of plain Python values."""
    return yaml.safe_dump(content, sort_keys=sort_keys, allow_unicode=True)
