"""The record of a task's inputs."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass

from moelpr.base.records import STRICT, Record

_SHOWN, _MOST_SHOWN = 80, 3  # characters of a change, and changes
# Text may have terabytes; a chain must start in a second.
_READ_WHOLE, _SAMPLES, _SAMPLE_BYTES = 1 << 20, 32, 1 << 15


@dataclass(frozen=True, config=STRICT)
class Mark(Record):
    """The inputs of a task that has run, `logs/TASK.json` in the workflow's folder or the one it shares.

    Attributes:
        command: Command line.
        id: Hash of command, made_from and files: the same for outputs that were made in the same way.
        made_from: For each task whose output was read, the ID of that output; null if it was not made here.
        files: SHA-256 of each other file that was read, or of all files of a folder; of a large file, of its size and
            of samples from all over it; of a remote one, its size and its checksum or ETag.
        wall_s: Seconds that the task took; null until it has succeeded.
        written: Names of the files of the model that it wrote.
    """

    FILE_NAME: ClassVar[str] = "logs/TASK.json"
    REMEDY: ClassVar[str] = "remove it, so that the task is done again"
    INDENT: ClassVar[int | None] = None

    command: str
    id: str
    made_from: dict[str, str | None]
    files: dict[str, str] = field(default_factory=dict)
    wall_s: float | None = None
    written: list[str] = field(default_factory=list)


def mark_of(
    words: Iterable[str],
    made_from: Mapping[str, str | None],
    files: Iterable[Path],
    versions: Mapping[str, str] | None = None,
) -> Mark:
    """The mark of a task that is about to run."""
    command = shown(words)
    checksums = {relative(str(path)): fingerprint(path) for path in files} | dict(versions or {})
    of = json.dumps([command, sorted(made_from.items()), sorted(checksums.items())])
    return Mark(command, hashlib.sha256(of.encode()).hexdigest()[:16], dict(made_from), checksums)


def shown(words: Iterable[str]) -> str:
    """A command line, with paths relative to the current folder."""
    return shlex.join(map(relative, words))


def difference(before: str, now: str) -> str:
    """The flags in which two command lines differ, for people: " (--lr 1e-3, not 1e-4)"; empty if none does."""
    old, new = _by_flag(before), _by_flag(now)
    changes = []
    for flag in dict.fromkeys([*new, *old]):
        if flag and old.get(flag) != new.get(flag):
            value = " ".join([flag, *new[flag]]) if flag in new else f"no {flag}"
            changes.append(value + (f", not {' '.join(old[flag])}" if old.get(flag) else ""))
    listed = [one if len(one) <= _SHOWN else f"{one[:_SHOWN]}…" for one in changes[:_MOST_SHOWN]]
    listed += [f"and {len(changes) - _MOST_SHOWN} more"] if len(changes) > _MOST_SHOWN else []
    return f" ({'; '.join(listed)})" if listed else ""


def _by_flag(command: str) -> dict[str, list[str]]:
    """The words after each flag; those before the first one are after ""."""
    values: dict[str, list[str]] = {"": []}
    flag = ""
    for word in shlex.split(command):
        if word.startswith("--"):
            flag = word
            values.setdefault(flag, [])
        else:
            values[flag].append(word)
    return values


def relative(word: str) -> str:
    return word.removeprefix(f"{os.getcwd()}/")


def fingerprint(path: Path) -> str:
    """The checksum of a file, or of the names and contents of all files in a folder; "" if it is missing."""
    if path.is_file():
        return _fingerprint_of_file(path, path.stat().st_mtime_ns)
    prints = [(str(file.relative_to(path)), fingerprint(file)) for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256(json.dumps(prints).encode()).hexdigest() if prints else ""


@cache
def _fingerprint_of_file(path: Path, _: int) -> str:
    """Several tasks may read a file; the second argument is its time of modification."""
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) <= _READ_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for place in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()
