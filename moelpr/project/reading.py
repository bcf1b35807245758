"""Read languages.yaml: every error names the file, the line, the key, and what would work."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moelpr.base import records
from moelpr.base.errors import UserError, did_you_mean
from moelpr.base.yaml_files import key_lines, parse_mapping
from moelpr.data.text import remote
from moelpr.data.text.filters import Filter
from moelpr.data.text.sources import find_files
from moelpr.project.project import Language, Project
from moelpr.project.steps import OWN_FLAGS, STEPS, steps_of

# OWNER/NAME, and a revision.
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
# Keys that other methods would ignore.
_MOE_LPR_ONLY = {
    "experts",
    "replay",
    "vocabulary",
    "chat",
    "chat_template",
    ("languages", "kept"),
    ("corpora", "stage2"),
}


@dataclass(frozen=True)
class ProjectFile:
    """A languages.yaml as it was read.

    Attributes:
        lines: The line of each key.
        checksum: SHA-256 of the text.
    """

    path: Path
    project: Project
    lines: dict[tuple[str | int, ...], int]
    checksum: str

    def at(self, *key: str) -> str:
        """The start of a message about a key: file and line."""
        return _at(self.path, self.lines, key)

    def check_unchanged(self) -> None:
        """Check that the file has not been edited since.

        Raises:
            UserError: It has.
        """
        if hashlib.sha256(_text(self.path).encode()).hexdigest() != self.checksum:
            raise UserError(
                f"{self.path} was edited after this run started; run moelpr run {self.path} again, which redoes what "
                "the edit changes"
            )


def read_project(path: Path) -> ProjectFile:
    """Read and check a languages.yaml; paths in it are relative to the current folder."""
    found = parse_project(_text(path), path)
    _check(found)
    return found


def parse_project(text: str, path: Path) -> ProjectFile:
    """Read the text of a languages.yaml, without looking at the files that it names; messages call it `path`."""
    content = parse_mapping(text, f"file {path}")
    lines = key_lines(text)
    _check_keys(path, content)
    try:
        project = _adapter().validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        first = records.first_problem(error)
        place = tuple(part for part in first["loc"] if isinstance(part, str | int))
        message = f"{_at(path, lines, place)}{records.reason(error)}{_suggestion(first, schema())}"
        raise UserError(message) from None
    return ProjectFile(path, project, lines, hashlib.sha256(text.encode()).hexdigest())


def _check_keys(path: Path, content: Any) -> None:
    """Check that keys are text: YAML reads the code of Norwegian as false."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(content, dict) and not isinstance(key, str):
            raise UserError(f"{path}: a key is read as {key!r}; put it in quotes, such as 'no' for Norwegian")
        if isinstance(value, dict | list):
            _check_keys(path, value)


def local_files(names: list[str]) -> list[Path]:
    """The local files that names of text stand for.

    Raises:
        UserError: A folder or pattern matches no file.
    """
    return [Path(file) for file in found_text(*names) if not remote.is_remote(file)]


def text_bytes(language: Language) -> int:
    """The size of a language's text, also where it is remote."""
    uris = filter(remote.is_remote, found_text(*language.text))
    return sum(path.stat().st_size for path in local_files(language.text)) + sum(_identity(uri).bytes for uri in uris)


def versions(*names: str) -> dict[str, str]:
    """The remote files that names of text stand for, each with what identifies its content.

    A commit of the Hub is left out of a name, because a later one may have the same file.
    """
    found = {uri: _identity(uri) for uri in filter(remote.is_remote, found_text(*names))}
    return {re.sub("@[0-9a-f]{40}/", "/", uri): f"{one.bytes} {one.version}" for uri, one in found.items()}


_identity = cache(remote.identify)


@cache
def found_text(*names: str) -> list[str]:
    """The files that names of text stand for."""
    return find_files([*names])


def _check(file: ProjectFile) -> None:
    """Check what is known before anything runs: models, text and steps.

    Raises:
        UserError: Something is missing or unknown.
    """
    project = file.project
    for key in ("model", "chat"):
        name = getattr(project, key)
        if name and not Path(name).exists() and not HUB_NAME.fullmatch(name):
            raise UserError(
                f"{file.at(key)}{key}: there is no folder {name}, and it is no name on the Hub (OWNER/NAME or "
                "OWNER/NAME@REVISION); correct it"
            )
    kept = {name: Language([text]) for name, text in project.languages.kept.items()}
    has_corpora = project.corpora is not None
    for group, texts in (
        ("expanded", project.languages.expanded),
        ("original", project.languages.original),
        ("kept", kept),
    ):
        for name, language in texts.items():
            try:
                _check_text(language, has_corpora=has_corpora and group != "kept")
            except UserError as error:
                place = "languages", group, name
                raise UserError(f"{file.at(*place)}{'.'.join(place)}: {error}") from None
    _check_conversations(file)
    _check_method(file)
    for step, flags in project.steps.items():
        if step not in STEPS:
            hint = did_you_mean(step, STEPS, f"the steps are {', '.join(STEPS)}")
            raise UserError(f"{file.at('steps', step)}steps.{step} is unknown; {hint}")
        for flag in OWN_FLAGS & flags.keys():
            raise UserError(f"{file.at('steps', step, flag)}steps.{step}.{flag} is set by moelpr run; remove it")


def _check_method(file: ProjectFile) -> None:
    """Check that nothing is given that the method would ignore."""
    project, steps = file.project, steps_of(file.project.method)
    is_moe = project.method == "moe-lpr"
    for key in file.lines:
        is_ignored = key[0] == "lora" and project.method != "lora"
        is_ignored |= key[0] == "steps" and len(key) > 1 and key[1] in STEPS and key[1] not in steps
        is_ignored |= not is_moe and (key[0] in _MOE_LPR_ONLY or key[:2] in _MOE_LPR_ONLY or key[-1] == "conversations")
        if is_ignored:
            name = ".".join(map(str, key))
            raise UserError(f"{file.at(*map(str, key))}{name} does not apply to method: {project.method}; remove it")
    if project.corpora and project.mix.replay:
        raise UserError(f"{file.at('mix', 'replay')}mix.replay has no effect with corpora; give them weights instead")
    if project.corpora and is_moe and project.replay and not project.corpora.stage2:
        raise UserError(f"{file.at('corpora')}corpora.stage2 is missing; add the corpora of stage 2")


def _check_conversations(file: ProjectFile) -> None:
    languages, template = file.project.languages, file.project.chat_template
    has_some = {
        group: any(language.conversations for language in getattr(languages, group).values())
        for group in ("expanded", "original")
    }
    if template and not any(has_some.values()):
        raise UserError(f"{file.at('chat_template')}chat_template requires conversations in a language; add them")
    if template and not Path(template).is_dir():
        raise UserError(
            f"{file.at('chat_template')}chat_template: there is no folder {template}; download the chat model"
        )
    is_kept = "lpr-loss-coeff" in file.project.steps.get("sft", {})
    if has_some["expanded"] and not has_some["original"] and not is_kept:
        raise UserError(
            f"{file.at('languages', 'original')}no original language has conversations, which keep what the model "
            "answers in it; add some, or set steps.sft.lpr-loss-coeff to 0"
        )


def _check_text(language: Language, has_corpora: bool) -> None:
    if language.filter:
        Filter(language.filter)
    if not language.text and not has_corpora:
        raise UserError("it has no text; add text: FILE")
    if has_corpora and not language.held_out:
        raise UserError("it requires held_out: FILE, because corpora are given")
    for uri in filter(remote.is_remote, [*language.text, *language.conversations, language.held_out or ""]):
        if remote.shown(uri) != uri:
            raise UserError(
                f"{remote.shown(uri)} has a query, which logs would show; download it, or pass its s3:// URI"
            )
    held_out = [Path(language.held_out)] if language.held_out and not remote.is_remote(language.held_out) else []
    for path in [*local_files(language.text), *held_out, *local_files(language.conversations)]:
        if not path.exists():
            raise UserError(f"there is no file {path}; correct the path")
        if not path.stat().st_size and len(found_text(*language.text)) < 2:
            raise UserError(f"{path} is empty; add text, or remove the language")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}; moelpr init writes a file that works") from error


def _at(path: Path, lines: dict[tuple[str | int, ...], int], key: tuple[str | int, ...]) -> str:
    known = next((key[:length] for length in range(len(key), 0, -1) if key[:length] in lines), None)
    return f"{path}, line {lines[known]}: " if known else f"{path}: "


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    return _adapter().json_schema()


@cache
def _adapter() -> TypeAdapter[Project]:
    return TypeAdapter(Project)


def _suggestion(problem: dict[str, Any] | Any, schema: dict[str, Any]) -> str:
    """The keys that would work in the place of an unknown one."""
    if not records.is_unknown_key(problem):
        return ""
    *path, name = problem["loc"]
    place = schema
    for part in path:
        place = _child(_resolve(place, schema), part)
    keys = list(_resolve(place, schema).get("properties", {}))
    return f"; {did_you_mean(str(name), keys, f'expected {", ".join(keys)}')}"


def _child(place: dict[str, Any], part: str | int) -> dict[str, Any]:
    found = place.get("properties", {}).get(part) or place.get("additionalProperties")
    return found if isinstance(found, dict) else {}


def _resolve(place: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference, or the one type that is not null of several, leads to."""
    for kind in place.get("anyOf", ()):
        if "$ref" in kind:
            place = kind
    reference = place.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][reference] if reference else place
