"""`checksums.json`: size and CRC-32 of the files next to it, so that a flipped bit or an incomplete copy is noticed.

A step folder has one, and so has a Hugging Face directory that a converter wrote. CRC-32 detects every flipped bit, and
anything longer except once in 4 billion; it protects against disks and copies, not against an attacker. zlib's is
faster than a disk.
"""

import os
import sys
import zlib
from collections.abc import Buffer, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from moelpr.base import ranks
from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record

FILE_NAME = "checksums.json"

# Pieces of files that have been read, by the names of the files: where one starts, its number of bytes and its CRC-32.
type Pieces = Mapping[str, set[tuple[int, int, int]]]


class Verify(StrEnum):
    """How much of a file readers compare with its checksums; a value of --verify-corpus."""

    FULL = "full"
    SAMPLED = "sampled"
    NONE = "none"


# The type of a setting that --no-verify sets; its default is `Verify.FULL`.
VerifyFlag = Annotated[Verify, {"names": ["--no-verify"], "action": "store_const", "const": Verify.NONE}]


@dataclass(frozen=True, config=STRICT)
class FileSum:
    """The size and the checksum of a file.

    Attributes:
        num_bytes: Size of the file.
        crc32: CRC-32 of its content, 8 hexadecimal digits.
    """

    num_bytes: Annotated[int, Field(ge=0)]
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]

    @classmethod
    def of(cls, path: Path, bar: "tqdm[None] | None" = None, pieces: Iterable[tuple[int, int, int]] = ()) -> "FileSum":
        """Read the file but for `pieces` of it. Does not keep Python's lock, so several threads read several files."""
        crc32, num_bytes = 0, 0
        buffer = memoryview(bytearray(1 << 20))
        with open(path, "rb", buffering=0) as file:
            for start, length, crc32_of_piece in (*sorted(pieces), (sys.maxsize, 0, 0)):
                while num_read := file.readinto(buffer[: max(0, start - num_bytes)]):
                    crc32 = zlib.crc32(buffer[:num_read], crc32)
                    num_bytes += num_read
                    if bar is not None:
                        bar.update(num_read)
                crc32 = _crc32_of_both(crc32, crc32_of_piece, length)
                num_bytes = file.seek(num_bytes + length)
        return cls(num_bytes, f"{crc32:08x}")


@dataclass(frozen=True, config=STRICT)
class WrittenFile:
    """A complete file of an unfinished output, as journals list it."""

    name: str
    sum: FileSum


class SummedFile:
    """A new binary file, which computes its checksum while it is written.

    Attributes:
        name: The file's name without its folder.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._crc32 = 0
        self._file = open(path, "wb")
        self.flush, self.tell, self.close = self._file.flush, self._file.tell, self._file.close

    def write(self, data: Buffer) -> int:
        self._crc32 = zlib.crc32(data, self._crc32)
        return self._file.write(data)

    def finish(self) -> FileSum:
        """Close the file when everything is on disk."""
        total = FileSum(self.tell(), f"{self._crc32:08x}")
        self.flush()
        os.fsync(self._file.fileno())
        self.close()
        return total


@dataclass(frozen=True, config=STRICT)
class Checksums(Record):
    """The checksums of the files in a folder: a step folder, or a Hugging Face directory that a converter wrote.

    Attributes:
        files: The sum of each file, by its name.
    """

    FILE_NAME: ClassVar[str] = FILE_NAME
    REMEDY: ClassVar[str] = "copy the folder again"
    INDENT: ClassVar[int | None] = 1

    files: dict[str, FileSum]

    def __post_init__(self) -> None:
        for name in self.files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{name!r} is not in the folder")


def write(folder: Path, sums: dict[str, FileSum]) -> None:
    """Write `folder`/checksums.json."""
    Checksums(dict(sorted(sums.items()))).write(folder)


def read(folder: Path, is_expected: bool = False) -> dict[str, FileSum] | None:
    """The sums in `folder`/checksums.json; None if it does not exist, with a note if it is expected."""
    record = Checksums.read_if_there(folder)
    if record is None and is_expected:
        _note_missing(folder)
    return None if record is None else record.files


class Verifier:
    """Verifies files of a folder when they are first read, which then finds them in the page cache.

    Args:
        fix: What to do about a damaged file.
        verify: `Verify.NONE` trusts all files.
        is_expected: Whether a folder without checksums is worth a note.
    """

    def __init__(self, folder: Path, fix: str, verify: Verify = Verify.FULL, is_expected: bool = False) -> None:
        self._folder, self._fix = folder, fix
        self._unverified = {} if verify is Verify.NONE else dict(read(folder, is_expected) or {})

    def verify(self, name: str) -> None:
        """Compare a file with its checksum, once."""
        expected = self._unverified.pop(name, None)
        if expected is not None:
            _compare(self._folder / name, _try_file(self._folder / name), expected, self._fix)


def verify_folder(folder: Path, fix: str, is_expected: bool = False, pieces: Pieces | None = None) -> None:
    """Compare all files with their checksums, if the folder has some.

    If torch.distributed is initialized, every rank must call this, with the `pieces` of files that it has read; they
    share the work, and read what none has.
    """
    if not (sums := read(folder, is_expected)):
        return
    of_ranks = ranks.gather(pieces or {})
    share = {name: set().union(*(part.get(name, ()) for part in of_ranks)) for name in ranks.own_share(sorted(sums))}
    actual = {name: sum_ for part in ranks.gather(sums_of(folder, share)) for name, sum_ in part.items()}
    for name, expected in sums.items():
        _compare(folder / name, actual[name], expected, fix)


def sums_of(folder: Path, pieces: Pieces) -> dict[str, FileSum | None]:
    """The sums of files, from pieces of them that have been read and the rest.

    None for a file that can't be read: a single rank must not fail while the others wait for it.
    """
    total = sum((folder / name).stat().st_size for name in pieces if (folder / name).is_file())
    total -= sum(length for of_file in pieces.values() for _, length, _ in of_file)
    is_hidden = not ranks.is_first_rank() or None
    title = f"checksums of {folder}"
    with (
        tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=2, disable=is_hidden) as bar,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        sums = pool.map(lambda name: _try_file(folder / name, bar, pieces[name]), pieces)
        return dict(zip(pieces, sums, strict=True))


def _try_file(
    path: Path, bar: "tqdm[None] | None" = None, pieces: Iterable[tuple[int, int, int]] = ()
) -> FileSum | None:
    try:
        return FileSum.of(path, bar, pieces)
    except (OSError, ValueError):  # a name with NUL
        return None


def _crc32_of_both(first: int, second: int, num_bytes: int) -> int:
    """The CRC-32 of two pieces, the second of this length, from theirs; zlib's `crc32_combine`, as of Python 3.15."""

    def product(one: int, other: int) -> int:
        """The product of polynomials, the lowest power in the highest bit, modulo that of CRC-32."""
        total = 0
        for bit in range(31, -1, -1):
            total ^= other * (one >> bit & 1)
            other = other >> 1 ^ 0xEDB88320 * (other & 1)
        return total

    power = 1 << 23  # a byte moves by x to the 8
    while num_bytes:
        first = product(first, power) if num_bytes & 1 else first
        power, num_bytes = product(power, power), num_bytes >> 1
    return first ^ second


def _compare(path: Path, actual: FileSum | None, expected: FileSum, fix: str) -> None:
    if actual == expected:
        return
    if actual is None:
        raise UserError(f"{path} is missing or can't be read; {fix}")
    problem = f"is damaged: its checksum differs from the one in {FILE_NAME}"
    if actual.num_bytes < expected.num_bytes:
        problem = f"is truncated: it has {actual.num_bytes:,} bytes, {FILE_NAME} says {expected.num_bytes:,}"
    raise UserError(f"{path} {problem}; {fix} (if the file was changed on purpose, delete {FILE_NAME})")


@cache
def _note_missing(folder: Path) -> None:
    if ranks.is_first_rank():
        print(f"moelpr: {folder} has no {FILE_NAME}, so it is not verified", file=sys.stderr)
