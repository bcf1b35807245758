"""Parse languages.yaml: every error names the file, the line, the key, and what would work."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moelpr.base import records
from moelpr.base.errors import CONTROL, MachineError, UserError, did_you_mean
from moelpr.base.yaml_files import key_lines, parse_mapping
from moelpr.data.text import remote
from moelpr.data.text.sources import find_files
from moelpr.project.project import PRESETS, Project, as_experts

# Keys where users look for what is elsewhere: pattern → what to write.
_ELSEWHERE = {
    r"hardware\.nodes": "write gpus, the number on all nodes, and gpus_per_node",
    r"slurm\.(partition|account|time|qos|mem|gres|(?!container)\w+(-\w+)+)": "write it under slurm.options",
    r"kubernetes\.(cpu|memory|resources|.+/.+)": "write it under kubernetes.training",
    r"kubernetes\.(volumeMounts|imagePullPolicy|\w+Probe|command)": "write it under kubernetes.container",
    r"kubernetes\.(affinity|tolerations|volumes|[a-z]+[A-Z]\w*)": "write it under kubernetes.pod",
}
# Keys whose paths are those of other machines.
_CLUSTERS = "slurm", "kubernetes", "skypilot"


@dataclass(frozen=True)
class Unread:
    """Text that cannot be read any more, of which tasks that are done were made."""

    bytes: int  # its size then
    error: UserError | MachineError  # why not


@dataclass(frozen=True)
class ProjectFile:
    """A languages.yaml as it was read."""

    path: Path
    project: Project
    lines: dict[tuple[str | int, ...], int]  # the line of each key
    checksum: str  # SHA-256 of the content
    # bytes of text of languages whose files need not be there, for a plan
    assumed: dict[str, int] = field(default_factory=dict)
    unread: dict[str, Unread] = field(default_factory=dict)  # by language, or name of a text to keep

    def at(self, *key: str) -> str:
        """The start of a message about a key: file and line."""
        return _at(self.path, self.lines, key)

    def check_unchanged(self) -> None:
        """Check that the file has not been edited since.

        Raises:
            UserError: It has.
        """
        if _checksum(parse_mapping(text_of(self.path), f"file {self.path}")) != self.checksum:
            raise UserError(
                f"{self.path} was edited after this run started; run moelpr run {self.path} again, which redoes what "
                "the edit changes"
            )


def parse_project(text: str, path: Path) -> ProjectFile:
    """Read the text of a languages.yaml, without looking at the files that it names; messages call it `path`."""
    content = parse_mapping(text, f"file {path}")
    lines, checksum = key_lines(text), _checksum(content)
    _check_words(path, content, lines)
    content = {key: value if key in _CLUSTERS else _expanded(value) for key, value in content.items()}
    experts = as_experts(content.get("experts"))
    if (preset := PRESETS.get(str(content.get("method", "auto")))) and isinstance(experts, dict):
        content["experts"] = preset | experts
    try:
        project = _adapter().validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        first = records.first_problem(error)
        place = tuple(part for part in first["loc"] if isinstance(part, str | int))
        hint = ""
        if records.is_unknown_key(first):
            known, key, name = _keys_at(place[:-1]), str(first["loc"][-1]), ".".join(map(str, place))
            hints = [to for pattern, to in _ELSEWHERE.items() if re.fullmatch(pattern, name)]
            hints += [f"write it under {top}" for top in known if not place[1:] and key in _keys_at((top,))]
            hint = f"; {(hints or [did_you_mean(key, known, f'its place has the keys {", ".join(known)}')])[0]}"
        elif place == ("method",) and re.search("rank|lora", str(first["input"])):
            hint = "; low-rank FFNs are method: second-ffn with experts: {rank: 16}"
        raise UserError(f"{_at(path, lines, place)}{records.reason(error)}{hint}") from None
    return ProjectFile(path, project, lines, checksum)


def _checksum(content: Any) -> str:
    """Return a checksum of what a file says; comments may change."""
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _expanded(value: Any) -> Any:
    """With the home folder in place of ~, as a shell does it."""
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _keys_at(place: Iterable[str | int]) -> list[str]:
    """The keys that the schema has at a place."""
    kinds: list[dict[str, Any]] = [schema()]
    for part in place:
        some = [one for kind in kinds for one in _below(kind, part)]
        kinds = [schema()["$defs"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in some]
    return [key for kind in kinds for key in kind.get("properties", ())]


def _below(kind: dict[str, Any], key: str | int) -> list[dict[str, Any]]:
    others = kind.get("additionalProperties")
    found = kind.get("properties", {}).get(key) or (others if isinstance(others, dict) else {})
    return [found, *found.get("anyOf", ())]


def _check_words(
    path: Path, content: Any, lines: dict[tuple[str | int, ...], int], place: tuple[str | int, ...] = ()
) -> None:
    """Check that keys are text, as YAML reads the code of Norwegian as false, and that no text could end a line."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for number, (key, value) in enumerate(items):
        may_have_lines = bool({"kubernetes", "skypilot", "filter"} & {*place, key})
        if isinstance(content, dict) and not isinstance(key, str):
            written = [one for one in lines if one[:-1] == place]
            is_number = isinstance(key, int | float) and not isinstance(key, bool)
            hint = "; decimals have a point, not a comma" if is_number else ", such as 'no' for Norwegian"
            raise UserError(
                f"{_at(path, lines, (written[number:] or [place])[0])}a key is read as {key!r}; put it in quotes{hint}"
            )
        for word in (key, value):
            if isinstance(word, str) and CONTROL.search(word.replace("\n", "") if may_have_lines else word):
                raise UserError(f"{_at(path, lines, (*place, key))}{word!r} has a control character; remove it")
        if isinstance(value, dict | list):
            _check_words(path, value, lines, (*place, key))


def local_files(names: list[str]) -> list[Path]:
    """The local files that names of text stand for.

    Raises:
        UserError: A folder or pattern matches no file.
    """
    return [Path(file) for file in found_text(*names) if not remote.is_remote(file)]


def text_bytes(file: ProjectFile, code: str) -> int:
    """The size of a language's text, also where it is remote or assumed."""
    if code in file.unread:
        return file.unread[code].bytes
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
