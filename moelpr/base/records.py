"""Records: small JSON files with typed fields, validated in one place.

A record is a frozen pydantic dataclass. Reading one checks types, unknown and missing fields, NaN, nesting and UTF-8,
so the code that uses it need not. Every message names the file, the field, what was found and a remedy.
docs/data-format.md lists all records; `python -m tests.support.records_page` makes that list from the classes.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import pydantic_core
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moelpr.base.errors import UserError
from moelpr.base.files import write_text

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
# For files that users write: the docstrings of fields become descriptions in the JSON schema.
DOCUMENTED = STRICT | ConfigDict(use_attribute_docstrings=True)
# For files of other programs, of which we read some fields.
FOREIGN = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, config=STRICT)
class Record:
    """A file that moelpr writes. Subclasses are decorated with `@dataclass(frozen=True, config=STRICT)` too.

    Checks of values, beyond types, belong in the subclass's `__post_init__`; it raises a `UserError`.

    Attributes:
        format_version: Version of the file's format. Files without it have version 1.
    """

    FILE_NAME: ClassVar[str]
    VERSION: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "restore the file, or make it again"
    INDENT: ClassVar[int | None] = 2
    ASCII: ClassVar[bool] = True  # other characters are escaped
    MISSING: ClassVar[str] = ""  # the message about a folder without the file, after the folder's name

    format_version: int = dataclasses.field(default=1, kw_only=True, compare=False)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`/FILE_NAME."""
        if cls.MISSING and not (folder / cls.FILE_NAME).is_file():
            raise UserError(
                f"{folder} {cls.MISSING}" if folder.is_dir() else f"there is no folder {folder}; correct the path"
            )
        return cls.read_file(folder / cls.FILE_NAME)

    @classmethod
    def read_if_there(cls, folder: Path) -> Self | None:
        """Read `folder`/FILE_NAME; None if it does not exist."""
        return cls.read(folder) if (folder / cls.FILE_NAME).is_file() else None

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Read a file of any name."""
        return cls.parse(content(path, cls.REMEDY), str(path))

    @classmethod
    def parse(cls, content: bytes | str, origin: str) -> Self:
        """Build the record from JSON text; messages call it `origin`."""
        parsed = parse_json(content, origin, cls.REMEDY)
        if (version := parsed.get("format_version", 1) if isinstance(parsed, dict) else cls.VERSION) != cls.VERSION:
            raise UserError(
                f"{origin}: format_version is {version!r}, but this program reads {cls.VERSION}; {cls.REMEDY}"
            )
        return parse(cls, content, origin, cls.REMEDY)

    def as_json(self) -> dict[str, Any]:
        """The fields as they are written."""
        return dataclasses.asdict(self) | {"format_version": self.VERSION}

    def write(self, folder: Path) -> None:
        """Write `folder`/FILE_NAME, complete or not at all."""
        self.write_file(folder / self.FILE_NAME)

    def write_file(self, path: Path) -> None:
        """Write a file of any name, complete or not at all."""
        write_text(path, json.dumps(self.as_json(), indent=self.INDENT, ensure_ascii=self.ASCII) + "\n")


def read[T](kind: type[T], path: Path, remedy: str) -> T:
    """Read a JSON file as `kind`, any type that pydantic validates: for formats of other programs."""
    return parse(kind, content(path, remedy), str(path), remedy)


def parse[T](kind: type[T], content: bytes | str, origin: str, remedy: str) -> T:
    """Validate JSON text as `kind`; messages call its origin `origin` and end with `remedy`."""
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(content))
    except ValidationError as error:
        raise UserError(f"{origin}: {reason(error)}; {remedy}") from error


def validate[T](kind: type[T], content: Any, origin: str, remedy: str) -> T:
    """Validate parsed JSON or YAML as `kind`, like `parse`; dates of YAML become text."""
    return parse(kind, json.dumps(content, default=str), origin, remedy)


def parse_json(content: bytes | str, origin: str, remedy: str) -> Any:
    """Parse JSON text of any type. NaN, half a surrogate pair and very deep nesting are errors."""
    try:
        return pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise UserError(f"{origin} is damaged or from another program ({error}); {remedy}") from error


def content(path: Path, remedy: str) -> bytes:
    """The content of a file; a UserError that ends with `remedy` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from error


_adapter = cache(TypeAdapter[Any])


def reason(error: ValidationError) -> str:
    """Say what is wrong in our words: the first problem, and how many more there are."""
    first = first_problem(error)
    place = ".".join(map(str, first["loc"])) or "the content"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        reason = f"{place}: {cause}" if str(cause).startswith("expected") else str(cause)
    elif first["type"] == "missing":
        reason = f"{place} is missing"
    elif is_unknown_key(first):
        reason = f"{place} is unknown"
    elif first["type"] == "json_invalid":
        reason = f"not JSON ({first['ctx']['error']})"
    else:
        message = first["msg"].removeprefix("Input ") if first["msg"].startswith("Input ") else f": {first['msg']}"
        message = message.replace("an object", "keys with values ({KEY: VALUE})")
        message = message.replace("valid array", "list ([A, B])")
        reason = f"{place} {message}, got {_shown(first['input'])}"
    errors = error.error_count()
    return f"{reason} (the first of {errors} errors)" if errors > 1 else reason


def first_problem(error: ValidationError) -> dict[str, Any] | Any:
    """The problem to report: an unknown key first, because a misspelled one is missing as well."""
    problems = error.errors(include_url=False)
    return next(filter(is_unknown_key, problems), problems[0])


def is_unknown_key(problem: Mapping[str, Any]) -> bool:
    return problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
