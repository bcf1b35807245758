"""`checksums.json`: size and CRC-32 of the files beside it, so that a flipped bit or an incomplete copy is noticed.

A step folder has one, and so has a Hugging Face directory that a converter wrote. CRC-32 detects every flipped bit, and
anything longer except once in 4 billion; it protects against disks and copies, not against an attacker. zlib's makes
4 GB/s on one core (benchmarks/comparisons/checksums.py), so the disk is the limit.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moelpr.process import ranks
from moelpr.process.errors import UserError
from moelpr.store.files import read_versioned, write_text

FILE_NAME = "checksums.json"
FORMAT_VERSION = 1


class Verify(StrEnum):
    """How much of a file readers compare with its checksums; a value of --verify-corpus."""

    FULL = "full"
    SAMPLED = "sampled"
    NONE = "none"


# The option --no-verify of all commands that read weights, as arguments of `add_argument`.
NO_VERIFY: dict[str, Any] = {
    "action": "store_const",
    "dest": "verify",
    "const": Verify.NONE,
    "default": Verify.FULL,
    "help": f"do not compare files with the checksums in {FILE_NAME}",
}


@dataclass(frozen=True)
class FileSum:
    """Size and CRC-32 (8 hexadecimal digits) of a file."""

    num_bytes: int
    crc32: str

    def __post_init__(self) -> None:
        if type(self.num_bytes) is not int or not isinstance(self.crc32, str):
            raise ValueError(f"a file must have num_bytes and crc32, got {self.num_bytes!r} and {self.crc32!r}")

    @classmethod
    def of(cls, path: Path, bar: "tqdm[None] | None" = None) -> "FileSum":
        """Read the file. Does not keep Python's lock, so several threads read several files."""
        crc32, num_bytes = 0, 0
        buffer = memoryview(bytearray(1 << 20))
        with open(path, "rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                crc32 = zlib.crc32(buffer[:num_read], crc32)
                num_bytes += num_read
                if bar is not None:
                    bar.update(num_read)
        return cls(num_bytes, f"{crc32:08x}")


def write(folder: Path, sums: dict[str, FileSum]) -> None:
    """Write `folder`/checksums.json."""
    content = {"format_version": FORMAT_VERSION, "files": {name: vars(sums[name]) for name in sorted(sums)}}
    write_text(folder / FILE_NAME, json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> dict[str, FileSum] | None:
    """The sums in `folder`/checksums.json; None if it does not exist.

    Raises:
        UserError: the file is damaged.
    """

    def build(files: dict[str, Any]) -> dict[str, FileSum]:
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} is not in the folder")
        return {name: FileSum(**fields) for name, fields in files.items()}

    path = folder / FILE_NAME
    return read_versioned(path, FORMAT_VERSION, build) if path.is_file() else None


class Verifier:
    """Verifies files of a folder when they are first read, which then finds them in the page cache.

    Args:
        fix: What to do about a damaged file.
        verify: `Verify.NONE` trusts all files.
        is_expected: Whether a folder without checksums is worth a note.
    """

    def __init__(self, folder: Path, fix: str, verify: Verify = Verify.FULL, is_expected: bool = False) -> None:
        self._folder, self._fix = folder, fix
        sums = {} if verify is Verify.NONE else read(folder)
        if sums is None and is_expected:
            _note_missing(folder)
        self._unverified = dict(sums or {})

    def verify(self, name: str) -> None:
        """Compare a file with its checksum, once.

        Raises:
            UserError: they differ.
        """
        expected = self._unverified.pop(name, None)
        if expected is not None:
            _compare(self._folder / name, _try_file(self._folder / name), expected, self._fix)


def verify_folder(folder: Path, fix: str, is_expected: bool = False) -> None:
    """Compare all files with their checksums, if the folder has some.

    If torch.distributed is initialized, every rank must call this; they share the work.

    Raises:
        UserError: a file differs, is missing or can't be read.
    """
    sums = read(folder)
    if sums is None and is_expected:
        _note_missing(folder)
    if not sums:
        return
    own = sums_of(folder, ranks.own_share(sorted(sums)))
    found = {name: found for part in ranks.gather(own) for name, found in part.items()}
    for name, expected in sums.items():
        _compare(folder / name, found[name], expected, fix)


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, FileSum | None]:
    """The sums of files; None for one that can't be read: a single rank must not fail while the others wait for it."""
    names = list(names)
    total = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    is_hidden = not ranks.is_first_rank() or None
    title = f"checksums of {folder}"
    with (
        tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=2, disable=is_hidden) as bar,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        return dict(zip(names, pool.map(lambda name: _try_file(folder / name, bar), names), strict=True))


def _try_file(path: Path, bar: "tqdm[None] | None" = None) -> FileSum | None:
    try:
        return FileSum.of(path, bar)
    except (OSError, ValueError):  # a name with NUL
        return None


def _compare(path: Path, found: FileSum | None, expected: FileSum, fix: str) -> None:
    if found == expected:
        return
    problem = f"is damaged: its checksum differs from the one in {FILE_NAME}"
    if found is None:
        problem = "is missing or can't be read"
    elif found.num_bytes < expected.num_bytes:
        problem = f"is truncated: it has {found.num_bytes:,} bytes, {FILE_NAME} says {expected.num_bytes:,}"
    raise UserError(f"{path} {problem}; {fix} (if the file was changed on purpose, delete {FILE_NAME})")


@cache
def _note_missing(folder: Path) -> None:
    if ranks.is_first_rank():
        print(
            f"moelpr: {folder} has no {FILE_NAME} (an older version wrote it), so it is not verified", file=sys.stderr
        )
