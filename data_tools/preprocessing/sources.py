"""Input files: which ones are meant, what is in them, and which part of them is one job's."""

import glob
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from moelpr.errors import UserError

STANDARD_INPUT = "-"
# What a folder is searched for; a file that is named is read whatever its name.
_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
_SUFFIXES = (*_TEXT_SUFFIXES, *(a + b for a in _TEXT_SUFFIXES for b in (".gz", ".zst", ".bz2", ".xz")), ".parquet")


class Form(StrEnum):
    """How a file holds its documents; told by its first bytes, not by its name."""

    LINES = "JSON lines"
    GZIP = "gzip"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    XZ = "xz"
    PARQUET = "Parquet"
    STREAM = "standard input"


_MAGIC = {
    b"\x1f\x8b": Form.GZIP,
    b"\x28\xb5\x2f\xfd": Form.ZSTD,
    b"BZh": Form.BZIP2,
    b"\xfd7zXZ\x00": Form.XZ,
    b"PAR1": Form.PARQUET,
}


class Source(NamedTuple):
    """An input file.

    Attributes:
        bytes: its size on the disk; 0 for standard input.
        dataset: index of the dataset it belongs to.
        sha1: what its content must have, from a registry; None: not stated.
    """

    path: str
    form: Form
    bytes: int
    dataset: int = 0
    sha1: str | None = None


class Share(NamedTuple):
    """A part of a source: of JSON lines those that begin in bytes [start, stop), of all else everything."""

    source: Source
    start: int
    stop: int


def find_files(names: list[str], flag: str = "--input") -> list[str]:
    """The files that names, folders and patterns mean, in the order given and by name within each.

    Raises:
        UserError: one of them is nothing.
    """
    found: list[str] = []
    for name in names:
        if name == STANDARD_INPUT or os.path.isfile(name):
            found.append(name)
        elif os.path.isdir(name):
            files = sorted(str(path) for path in Path(name).rglob("*") if _is_input(path))
            if not files:
                raise UserError(
                    f"the folder {name} holds no {', '.join(_TEXT_SUFFIXES)} (.gz, .zst, .bz2, .xz) or .parquet"
                )
            found += files
        elif files := sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path)):
            found += files
        elif glob.has_magic(name) and not os.path.lexists(name):
            raise UserError(f"no file matches {flag} {name}")
        else:
            found.append(name)  # opening it says what is wrong
    return found


def open_source(path: str, dataset: int = 0, sha1: str | None = None) -> Source:
    """What a file is; it is opened once so that a mistake shows before the work starts.

    Raises:
        UserError: it can't be read.
    """
    if path == STANDARD_INPUT:
        return Source(path, Form.STREAM, 0, dataset)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"the input {path} can't be read ({error.strerror}); --input wants JSON lines files") from error
    form = next((form for magic, form in _MAGIC.items() if start.startswith(magic)), Form.LINES)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"the input {path} is UTF-16; convert it to UTF-8, for example with iconv")
    return Source(path, form, size, dataset, sha1)


def shares_of(sources: list[Source], shard: int, num_shards: int) -> Iterator[Share]:
    """A shard's shares, in order: an equal slice of the files' bytes one after another.

    JSON lines are cut anywhere; a file of another form goes whole to the shard that has its first byte.
    """
    total = sum(source.bytes for source in sources)
    first, last = (total * index // num_shards for index in (shard, shard + 1))
    begin = 0
    for source in sources:
        start, stop = max(first - begin, 0), min(last - begin, source.bytes)
        if source.form is Form.STREAM or (source.form is not Form.LINES and first <= begin < last):
            yield Share(source, 0, source.bytes)
        elif source.form is Form.LINES and start < stop:
            yield Share(source, start, stop)
        begin += source.bytes


def _is_input(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and not path.name.startswith(".") and path.is_file()
