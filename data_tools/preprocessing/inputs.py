"""Input files: which ones to read, which part of them belongs to this job, and batches of their lines or rows."""

import bz2
import glob
import gzip
import io
import lzma
import os
import random
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moelpr.errors import DISK_FULL, UserError

STANDARD_INPUT = "-"
# Files to look for in a folder; a file that is named explicitly may have any name.
_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
_SUFFIXES = (*_TEXT_SUFFIXES, *(a + b for a in _TEXT_SUFFIXES for b in (".gz", ".zst", ".bz2", ".xz")), ".parquet")
_MANIFEST_SUFFIX = ".manifest.json"  # of a corpus that was written into the folder
# Large enough to be worth sending to a worker, small compared with the memory that encoding it takes.
BATCH_BYTES = 1 << 19
# A longer line is passed on as a range of a file, never in memory.
LONG_LINE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 16
_SKIP_BYTES = 1 << 20
_ROWS_AT_ONCE = 64


class Form(StrEnum):
    """Format of a file, detected by its first bytes, not by its name."""

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
        bytes: file size; 0 for standard input.
        dataset: index of the dataset that the file belongs to.
        sha1: expected checksum, from a registry; None if it states none.
    """

    path: str
    form: Form
    bytes: int
    dataset: int = 0
    sha1: str | None = None


class Share(NamedTuple):
    """A part of a source: the JSON lines that begin in bytes [start, stop), or all of a file of any other form."""

    source: Source
    start: int
    stop: int


class ReadCursor(NamedTuple):
    """Where to resume reading.

    Attributes:
        share: index of the share.
        offset: byte of the (decompressed) JSON lines, or row of the Parquet file.
        line: number of lines or rows before it in the share; not counted in plain files.
        documents: number of these that are not blank.
    """

    share: int = 0
    offset: int = 0
    line: int = 0
    documents: int = 0


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file: complete lines, to be read where they are needed."""

    path: str
    start: int
    stop: int
    is_temporary: bool = False

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class Batch(NamedTuple):
    """Unparsed lines or rows of one input file.

    Attributes:
        content: lines, the range of a file that contains them, or rows of a table.
        numbers: line or row numbers within the share, from 1; None if they are consecutive from 1.
        after: where reading resumes after this batch.
        num_bytes: decompressed size.
        file_bytes: size in the file, for the progress bar.
    """

    share: Share
    content: list[bytes] | FileRange | list[dict[str, Any]]
    numbers: list[int] | None
    after: ReadCursor
    num_bytes: int
    file_bytes: int

    @property
    def is_long_line(self) -> bool:
        """Whether this is a single line that is too long for memory."""
        return isinstance(self.content, FileRange) and self.content.num_bytes > LONG_LINE_BYTES

    def items(self) -> Sequence[bytes | dict[str, Any] | FileRange]:
        """Return the lines without line ends, the rows, or the range of the one line that is too long for memory."""
        if not isinstance(self.content, FileRange):
            return self.content
        if self.is_long_line:
            return [self.content]
        with open(self.content.path, "rb") as file:
            file.seek(self.content.start)
            return file.read(self.content.num_bytes).removesuffix(b"\n").split(b"\n")

    def where(self, index: int) -> str:
        """Return file and line number of item `index` for a message; counts the lines before the share to do so."""
        source, start, _ = self.share
        number = index + 1 if self.numbers is None else self.numbers[index]
        if source.form is Form.PARQUET:
            return f"{source.path}, row {number}"
        path = "standard input" if source.form is Form.STREAM else source.path
        return f"{path}:{number + (_lines_before(path, start) if start else 0)}"


def find_files(names: list[str]) -> list[str]:
    """Expand file names, folders and glob patterns to files: in the given order, sorted within each.

    Raises:
        UserError: A folder or pattern matches no file.
    """
    found: list[str] = []
    for name in names:
        if name == STANDARD_INPUT or os.path.isfile(name):
            found.append(name)
        elif os.path.isdir(name):
            if not (files := sorted(_files_below(name))):
                types = ", ".join(_TEXT_SUFFIXES)
                raise UserError(f"the folder {name} contains no {types} (.gz, .zst, .bz2, .xz) or .parquet file")
            found += files
        elif files := sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path)):
            found += files
        elif glob.has_magic(name) and not os.path.lexists(name):
            raise UserError(f"no file matches --input {name}; check the pattern and the current folder")
        else:
            found.append(name)  # opening it reports what is wrong
    return found


def _files_below(folder: str) -> Iterator[str]:
    """Files with text in a folder and the folders in it, links included, but hidden ones and corpora's manifests."""
    seen = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real in seen:  # a link to a folder around it, or a second one
            continue
        seen.add(real)
        for name in names:
            file = str(Path(path) / name)
            is_hidden = name.startswith(".") or name.endswith(_MANIFEST_SUFFIX)
            if name.endswith(_SUFFIXES) and not is_hidden and os.path.isfile(file):
                yield file


def open_source(path: str, dataset: int = 0, sha1: str | None = None) -> Source:
    """Detect the form of a file. Opens it once, so that errors show before the work starts.

    Raises:
        UserError: The file can't be read.
    """
    if path == STANDARD_INPUT:
        return Source(path, Form.STREAM, 0, dataset)
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            # The size of a pipe is unknown, and it can be read only once.
            raise UserError(f"the input {path} is not a file; pass its text to standard input, with --input -")
        with open(path, "rb") as file:
            start = file.read(8)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"the input {path} can't be read ({error.strerror}); pass JSON lines or Parquet files"
        ) from error
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"the input {path} is UTF-16; convert it to UTF-8, for example with iconv")
    form = next((form for magic, form in _MAGIC.items() if start.startswith(magic)), Form.LINES)
    return Source(path, form, size, dataset, sha1)


def shares_of(sources: list[Source], shard: int, num_shards: int) -> Iterator[Share]:
    """Yield the shares of a shard, in order: an equal slice of the concatenated files' bytes.

    JSON lines are split anywhere; a file of another form belongs to the shard that contains its first byte.
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


# Content and its size, and offset, line and documents of the cursor after it. A plain tuple, since every line has one.
_Item = tuple[bytes | FileRange | dict[str, Any], int, int, int, int]


class Reader:
    """Reads shares in batches, in order, keeping only a few batches in memory.

    Args:
        columns: columns to read from the Parquet files of each dataset.
        chosen: documents to read from each share, counted from 0, ascending; None: all.
        spool: folder for lines of compressed files that are too long for memory.
    """

    def __init__(
        self, shares: list[Share], columns: list[list[str]], chosen: list[NDArray[np.int64]] | None, spool: Path
    ) -> None:
        self._shares = shares
        self._columns = columns
        self._chosen = None if chosen is None else [set(documents.tolist()) for documents in chosen]
        self._spool = spool

    def batches(self, cursor: ReadCursor) -> Iterator[Batch]:
        """Yield batches from `cursor` on.

        Raises:
            UserError: A file can't be read or is damaged.
        """
        for index in range(cursor.share, len(self._shares)):
            share = self._shares[index]
            start = cursor if index == cursor.share else ReadCursor(index)
            with _name_damaged(share.source):
                if share.source.form is Form.PARQUET:
                    yield from self._table_rows(share, start)
                elif share.source.form is Form.LINES and self._chosen is None:
                    yield from self._plain_lines(share, start)
                else:
                    yield from self._stream_lines(share, start)

    def _is_chosen(self, share: int, document: int) -> bool:
        return self._chosen is None or document in self._chosen[share]

    def _plain_lines(self, share: Share, cursor: ReadCursor) -> Iterator[Batch]:
        """Find only the ends of batches; the workers read what is between."""
        path = share.source.path
        with open(path, "rb") as file:
            position = cursor.offset or (_line_end(file, share.start - 1) if share.start else 0)
            while position < share.stop:
                stop = _line_end(file, min(position + BATCH_BYTES, share.stop) - 1)
                borders = [position, stop]
                if stop - position > LONG_LINE_BYTES:  # its last line is too long for memory: a batch of its own
                    file.seek(position)
                    borders.insert(1, position + file.read(BATCH_BYTES).rfind(b"\n") + 1)
                for start, end in zip(borders[:-1], borders[1:], strict=True):
                    if start < end:
                        after = cursor._replace(offset=end)
                        here = Share(share.source, start, end)
                        yield Batch(here, FileRange(path, start, end), None, after, end - start, end - start)
                position = stop

    def _stream_lines(self, share: Share, cursor: ReadCursor) -> Iterator[Batch]:
        with _open_stream(share.source) as (stream, tell):
            left = cursor.offset
            while left and (piece := stream.read(min(left, _SKIP_BYTES))):
                left -= len(piece)
            if left:
                raise EOFError("it is shorter than when the job started")
            yield from _batches(share, cursor, self._lines(stream, cursor), lambda _: tell())

    def _lines(self, stream: BinaryIO, cursor: ReadCursor) -> Iterator[_Item]:
        share, offset, line, documents = cursor
        while content := stream.readline(LONG_LINE_BYTES):
            line += 1
            long_line = None
            if len(content) == LONG_LINE_BYTES and not content.endswith(b"\n"):
                long_line = self._spool_line(content, stream, f"line-{share}-{line}")
            elif content.isspace():
                num_bytes, num_lines = _skip_blank_lines(stream)
                offset += len(content) + num_bytes
                line += num_lines
                continue
            size = long_line.num_bytes if long_line else len(content)
            offset += size
            documents += 1
            if self._is_chosen(share, documents - 1):
                yield long_line or content, size, offset, line, documents

    def _spool_line(self, start: bytes, stream: BinaryIO, name: str) -> FileRange:
        with open(self._spool / name, "wb") as file:
            piece = start
            while piece:
                file.write(piece)
                piece = b"" if piece.endswith(b"\n") else stream.readline(_BLOCK_BYTES)
            return FileRange(file.name, 0, file.tell(), is_temporary=True)

    def _table_rows(self, share: Share, cursor: ReadCursor) -> Iterator[Batch]:
        from pyarrow import parquet

        source, columns = share.source, self._columns[share.source.dataset]
        with parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise UserError(f"{source.path} has no column {missing[0]}; its columns are {', '.join(names)[:200]}")
            bytes_per_row = source.bytes / max(file.metadata.num_rows, 1)
            rows = self._rows(file, columns, cursor)
            yield from _batches(share, cursor, rows, lambda place: int(place.offset * bytes_per_row))

    def _rows(self, file: Any, columns: list[str], cursor: ReadCursor) -> Iterator[_Item]:
        number = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if number + num_rows <= cursor.offset:
                number += num_rows
                continue
            for table in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                skipped = max(cursor.offset - number, 0)
                for place, row in enumerate(_python_rows(table[skipped:]), number + skipped):
                    if self._is_chosen(cursor.share, place):
                        yield row, table.nbytes // len(table), place + 1, place + 1, place + 1
                number += len(table)


def _python_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a Parquet table; text that is not UTF-8 becomes bytes, which are a malformed value of that row."""
    import pyarrow

    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        text = (pyarrow.string(), pyarrow.large_string())
        columns = [column.cast(pyarrow.binary()) if column.type in text else column for column in table.columns]
        rows = pyarrow.RecordBatch.from_arrays(columns, names=table.schema.names).to_pylist()
        return [{name: _decoded(value) for name, value in row.items()} for row in rows]


def _decoded(value: Any) -> Any:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _batches(
    share: Share, cursor: ReadCursor, items: Iterator[_Item], file_bytes: Callable[[ReadCursor], int]
) -> Iterator[Batch]:
    """Batch the items from `cursor` on; `file_bytes` returns how many bytes of the file have been read."""
    held: list[_Item] = []
    size, last = 0, file_bytes(cursor)
    for item in chain(items, [None]):
        is_full = item is None or size >= BATCH_BYTES or type(item[0]) is FileRange
        if held and (is_full or type(held[0][0]) is FileRange):
            content, _, offsets, lines, documents = zip(*held, strict=True)
            after = ReadCursor(cursor.share, offsets[-1], lines[-1], documents[-1])
            position = file_bytes(after)
            parts = content[0] if isinstance(content[0], FileRange) else list(content)
            yield Batch(share, parts, list(lines), after, size, position - last)
            held, size, last = [], 0, position
        if item is not None:
            held.append(item)
            size += item[1]


def sample_documents(
    shares: list[Share], names: list[str], max_samples: int, seed: int
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Sample `max_samples` documents of each dataset, without replacement.

    Reads every file once to count its documents; memory is needed only for those chosen.

    Args:
        shares: complete files.
        names: dataset names; the sample depends only on a dataset's name, its documents and the seed.

    Returns:
        The chosen documents of each share, counted from 0, ascending; and a note for each dataset that has no more.
    """
    counts = [_count_documents(share) for share in shares]
    chosen = [np.zeros(0, np.int64) for _ in shares]
    notes = []
    for dataset, name in enumerate(names):
        members = [index for index, share in enumerate(shares) if share.source.dataset == dataset]
        total = sum(counts[index] for index in members)
        if total <= max_samples:
            label = f"the dataset {name}" if name else "the input"
            notes.append(f"{label} contains {total:,} documents, so --max-samples {max_samples:,} takes all of them")
        sampled = np.sort(random.Random(f"{seed} {name}").sample(range(total), min(max_samples, total)))
        start = 0
        for index in members:
            first, last = np.searchsorted(sampled, [start, start + counts[index]])
            chosen[index] = sampled[first:last] - start
            start += counts[index]
    return chosen, notes


def _count_documents(share: Share) -> int:
    """Count the rows, or the lines that are not blank, of a complete file."""
    with _name_damaged(share.source):
        if share.source.form is Form.PARQUET:
            from pyarrow import parquet

            return parquet.read_metadata(share.source.path).num_rows
        with _open_stream(share.source) as (stream, _):
            documents, at_line_start = 0, True
            while piece := stream.readline(_BLOCK_BYTES):
                is_blank = piece.isspace()
                documents += at_line_start and not is_blank
                at_line_start = piece.endswith(b"\n")
                if is_blank and at_line_start:
                    _skip_blank_lines(stream)
            return documents


def _skip_blank_lines(stream: Any) -> tuple[int, int]:
    """Skip the blank lines that are in the stream's buffer; returns their bytes and their number.

    An archive of a few kilobytes may contain a billion of them.
    """
    buffered = stream.peek(1)
    end = buffered.rfind(b"\n", 0, len(buffered) - len(buffered.lstrip())) + 1
    stream.read(end)
    return end, buffered.count(b"\n", 0, end)


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    import pyarrow  # Python's own zstd comes with 3.14

    native = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return cast(BinaryIO, io.BufferedReader(native, _BLOCK_BYTES))


_OPENERS: dict[Form, Callable[[BinaryIO], Any]] = {
    Form.LINES: nullcontext,
    Form.GZIP: gzip.open,
    Form.BZIP2: bz2.open,
    Form.XZ: lzma.open,
    Form.ZSTD: _open_zstd,
}


@contextmanager
def _open_stream(source: Source) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Yield a source's decompressed lines, and a function that returns how many bytes of the file have been read."""
    if source.form is Form.STREAM:
        yield sys.stdin.buffer, lambda: 0
        return
    with open(source.path, "rb") as raw:
        with _OPENERS[source.form](raw) as stream:
            yield stream, raw.tell


@contextmanager
def _name_damaged(source: Source) -> Iterator[None]:
    """Report which file is damaged.

    A damaged archive always stops the job: it is unknown how many documents it has lost.
    """
    try:
        yield
    except UserError:
        raise
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow's are OSError or ValueError
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"the input {source.path} ({source.form}) is damaged or truncated ({reason}); copy it again, or omit it"
        ) from error


# File -> the last byte before which this process has counted lines, and their number.
_counted: dict[str, tuple[int, int]] = {}


def _lines_before(path: str, start: int) -> int:
    """Count the lines of a file before byte `start`, the start of a line; batches mostly come in their order."""
    position, lines = _counted.get(path, (0, 0))
    if position > start:
        position, lines = 0, 0
    with open(path, "rb") as file:
        file.seek(position)
        while position < start and (piece := file.read(min(start - position, _SKIP_BYTES))):
            lines += piece.count(b"\n")
            position += len(piece)
    _counted[path] = position, lines
    return lines


def _line_end(file: BinaryIO, position: int) -> int:
    """Return the position after the first line feed at `position` or later, or the end of the file."""
    file.seek(position)
    while block := file.read(_BLOCK_BYTES):
        if (found := block.find(b"\n")) >= 0:
            return position + found + 1
        position += len(block)
    return position
