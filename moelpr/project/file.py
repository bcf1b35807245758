"""Parse languages.yaml: every error names the file, the line, the key, and what would work."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moelpr.base import records
from moelpr.base.errors import CONTROL, UserError, did_you_mean
from moelpr.base.yaml_files import key_lines, parse_mapping
from moelpr.data.text import remote
from moelpr.data.text.sources import find_files
from moelpr.project.project import PRESETS, Project, as_experts


@dataclass(frozen=True)
class ProjectFile:
    """A languages.yaml as it was read."""

    path: Path
    project: Project
    lines: dict[tuple[str | int, ...], int]  # the line of each key
    checksum: str  # SHA-256 of the text
    # bytes of text of languages whose files need not be there, for a plan
    assumed: dict[str, int] = field(default_factory=dict)

    def at(self, *key: str) -> str:
        """The start of a message about a key: file and line."""
        return _at(self.path, self.lines, key)

    def check_unchanged(self) -> None:
        """Check that the file has not been edited since.

        Raises:
            UserError: It has.
        """
        if hashlib.sha256(text_of(self.path).encode()).hexdigest() != self.checksum:
            raise UserError(
                f"{self.path} was edited after this run started; run moelpr run {self.path} again, which redoes what "
                "the edit changes"
            )


def parse_project(text: str, path: Path) -> ProjectFile:
    """Read the text of a languages.yaml, without looking at the files that it names; messages call it `path`."""
    content = parse_mapping(text, f"file {path}")
    lines = key_lines(text)
    _check_words(path, content)
    experts = as_experts(content.get("experts"))
    if (preset := PRESETS.get(str(content.get("method")))) and isinstance(experts, dict):
        content["experts"] = preset | experts
    try:
        project = _adapter().validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        first = records.first_problem(error)
        place = tuple(part for part in first["loc"] if isinstance(part, str | int))
        hint = ""
        if records.is_unknown_key(first):
            kinds, key = [schema(), *schema()["$defs"].values()], str(first["loc"][-1])
            known = {one for kind in kinds for one in kind.get("properties", {})}
            see = "moelpr init --schema lists the keys"
            hint = f"; it belongs elsewhere: {see}" if key in known else f"; {did_you_mean(key, sorted(known), see)}"
        raise UserError(f"{_at(path, lines, place)}{records.reason(error)}{hint}") from None
    return ProjectFile(path, project, lines, hashlib.sha256(text.encode()).hexdigest())


def _check_words(path: Path, content: Any, may_have_lines: bool = False) -> None:
    """Check that keys are text, as YAML reads the code of Norwegian as false, and that no text could end a line."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(content, dict) and not isinstance(key, str):
            raise UserError(f"{path}: a key is read as {key!r}; put it in quotes, such as 'no' for Norwegian")
        lines_here = may_have_lines or key in ("kubernetes", "skypilot", "filter")
        for word in (key, value):
            if isinstance(word, str) and CONTROL.search(word.replace("\n", "") if lines_here else word):
                raise UserError(f"{path}: {word!r} has a control character; remove it")
        if isinstance(value, dict | list):
            _check_words(path, value, lines_here)


def local_files(names: list[str]) -> list[Path]:
    """The local files that names of text stand for.

    Raises:
        UserError: A folder or pattern matches no file.
    """
    return [Path(file) for file in found_text(*names) if not remote.is_remote(file)]


def text_bytes(file: ProjectFile, code: str) -> int:
    """The size of a language's text, also where it is remote or assumed."""
    if code in file.assumed:
        return file.assumed[code]
    language = dict(file.project.languages)[code]
    uris = filter(remote.is_remote, found_text(*language.text))
    return sum(path.stat().st_size for path in local_files(language.text)) + sum(_identity(uri).bytes for uri in uris)


def versions(*names: str) -> dict[str, str]:
    """The remote files that names of text stand for, each with what identifies its content.

    A commit of the Hub is left out of a name, because a later one may have the same file.
    """
    identities = {uri: _identity(uri) for uri in filter(remote.is_remote, found_text(*names))}
    return {re.sub("@[0-9a-f]{40}/", "/", uri): f"{one.bytes} {one.version}" for uri, one in identities.items()}


_identity = cache(remote.identify)


@cache
def found_text(*names: str) -> list[str]:
    """The files that names of text stand for."""
    return find_files([*names])


def text_of(path: Path) -> str:
    """The text of the file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}; name a languages.yaml, as moelpr init writes one") from error


def _at(path: Path, lines: dict[tuple[str | int, ...], int], key: tuple[str | int, ...]) -> str:
    known = next((key[:length] for length in range(len(key), 0, -1) if key[:length] in lines), None)
    return f"{path}, line {lines[known]}: " if known else f"{path}: "


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    return _adapter().json_schema()


@cache
def _adapter() -> TypeAdapter[Project]:
    return TypeAdapter(Project)
