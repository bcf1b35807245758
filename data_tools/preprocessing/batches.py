"""The lines or rows of a job's shares, in batches."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moelpr.data.text.documents import is_blank
from moelpr.data.text.sources import Form, Source
from moelpr.data.text.streams import BLOCK_BYTES, name_damaged, open_stream
from moelpr.data.text.tables import num_bytes, open_table, rows_of

# Large enough to be worth sending to a worker, small compared with the memory that encoding it takes.
BATCH_BYTES = 1 << 19
# A longer document is left out: a tokenizer needs about 120 times a text's size while it works.
DOCUMENT_BYTES = 1 << 24
# A larger row group is read by the main process, in batches of its rows, as no worker can begin in its midst.
ROW_GROUP_BYTES = 1 << 24
_SKIP_BYTES = 1 << 20


class Share(NamedTuple):
    """A part of a source: the JSON lines or row groups that begin in bytes [start, stop), or all of another file."""

    source: Source
    start: int
    stop: int


def shares_of(sources: list[Source], shard: int, num_shards: int) -> Iterator[Share]:
    """Yield the shares of a shard, in order: an equal slice of the concatenated files' bytes.

    JSON lines are split anywhere, and a Parquet file between row groups, which count as equally large. A file of
    another form belongs to the shard that contains its first byte.
    """
    total = sum(source.bytes for source in sources)
    first, last = (total * index // num_shards for index in (shard, shard + 1))
    begin = 0
    for source in sources:
        start, stop = max(first - begin, 0), min(last - begin, source.bytes)
        is_splittable = source.form in (Form.LINES, Form.PARQUET)
        if source.form is Form.STREAM or (not is_splittable and first <= begin < last):
            yield Share(source, 0, source.bytes)
        elif is_splittable and start < stop:
            yield Share(source, start, stop)
        begin += source.bytes


class ReadCursor(NamedTuple):
    """Where to resume reading."""

    share: int = 0  # index of the share
    offset: int = 0  # byte of the (decompressed) JSON lines, or row of the Parquet file
    line: int = 0  # lines before it in the share, or rows in the file; not counted in plain files
    documents: int = 0  # lines or rows that are not blank; counted only if some are chosen, and in compressed files


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file: complete lines, to be read where they are needed."""

    path: str
    start: int
    stop: int


class LongLine(NamedTuple):
    """A line of more than DOCUMENT_BYTES, which is never in memory."""

    num_bytes: int


Item = bytes | LongLine | dict[str, Any]


class RowGroups(NamedTuple):
    """Row groups of a Parquet file, to be read where they are needed; `first` is the number of rows before them."""

    groups: range
    columns: list[str]
    first: int


class Batch(NamedTuple):
    """Unparsed lines or rows of one input file."""

    share: Share
    # lines or long lines, the range of a file that contains lines, or rows of a table, or its row groups
    content: list[Item] | FileRange | RowGroups
    # numbers of the lines within the share, or of the rows within the file, from 1; None if they are consecutive
    numbers: Sequence[int] | None
    after: ReadCursor  # where reading resumes after this batch
    num_bytes: int  # decompressed size
    file_bytes: int  # size in the file, for the progress bar

    def pieces(self) -> Iterator["Batch"]:
        """Yield the rows of row groups in batches of the usual size, and any other batch as it is."""
        if isinstance(self.content, RowGroups):
            items = ((row, size, number, number, number) for number, (row, size) in enumerate(self._rows(), 1))
            for batch in _batches(self.share, ReadCursor(), items, lambda _: 0):
                yield batch._replace(numbers=[self.content.first + number for number in batch.numbers or ()])
        else:
            yield self

    def _rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        assert isinstance(self.content, RowGroups)
        groups, columns, _ = self.content
        with name_damaged(self.share.source), open_table(self.share.source, columns) as file:
            yield from rows_of(file, groups, columns)

    def items(self) -> Iterable[Item]:
        """Return the lines without line ends, or the rows."""
        if isinstance(self.content, RowGroups):
            return (row for row, _ in self._rows())
        if isinstance(self.content, list):
            return self.content
        path, start, stop = self.content
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start).removesuffix(b"\n").split(b"\n")

    def where(self, index: int) -> str:
        """Return file and line number of item `index` for a message; counts the lines before the share to do so."""
        source, start, _ = self.share
        first = self.content.first if isinstance(self.content, RowGroups) else 0
        number = first + index + 1 if self.numbers is None else self.numbers[index]
        if source.form is Form.PARQUET:
            return f"{source.path}, row {number}"
        path = "standard input" if source.form is Form.STREAM else source.path
        return f"{path}:{number + (_lines_before(source.file, start) if start else 0)}"


# Content and its size, and offset, line and documents of the cursor after it. A plain tuple, since every line has one.
_Placed = tuple[Item, int, int, int, int]


class Reader:
    """Reads shares in batches, in order, keeping only a few batches in memory.

    Args:
        columns: Columns to read from the Parquet files of each dataset.
        chosen: Documents to read from each share, counted from 0, ascending; None: all.
    """

    def __init__(self, shares: list[Share], columns: list[list[str]], chosen: list[NDArray[np.int64]] | None) -> None:
        self._shares = shares
        self._columns = columns
        self._chosen = None if chosen is None else [set(documents.tolist()) for documents in chosen]

    def batches(self, cursor: ReadCursor) -> Iterator[Batch]:
        """Yield batches from `cursor` on."""
        for index in range(cursor.share, len(self._shares)):
            share = self._shares[index]
            start = cursor if index == cursor.share else ReadCursor(index)
            with name_damaged(share.source):
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
        path = share.source.file
        with open(path, "rb") as file:
            position = cursor.offset or _first_line(file, share)
            while position < share.stop:
                stop = _line_end(file, min(position + BATCH_BYTES, share.stop) - 1)
                if stop <= position or stop > os.fstat(file.fileno()).st_size:
                    raise EOFError("it is shorter than when the job started")
                borders = [position, stop]
                if stop - position > DOCUMENT_BYTES:  # its last line is long: a batch of its own
                    file.seek(position)
                    borders.insert(1, position + file.read(BATCH_BYTES).rfind(b"\n") + 1)
                for start, end in zip(borders[:-1], borders[1:], strict=True):
                    if start < end:
                        size, after = end - start, cursor._replace(offset=end)
                        is_long = size > DOCUMENT_BYTES
                        content: list[Item] | FileRange = [LongLine(size)] if is_long else FileRange(path, start, end)
                        yield Batch(Share(share.source, start, end), content, None, after, size, size)
                position = stop

    def _stream_lines(self, share: Share, cursor: ReadCursor) -> Iterator[Batch]:
        with open_stream(share.source) as (stream, tell):
            stop, left = math.inf, cursor.offset
            if share.source.form is Form.LINES:
                stop, left = share.stop, 0
                cursor = cursor._replace(offset=cursor.offset or _first_line(stream, share))
                stream.seek(cursor.offset)
            while left and (piece := stream.read(min(left, _SKIP_BYTES))):
                left -= len(piece)
            if left:
                raise EOFError("it is shorter than when the job started")
            yield from _batches(share, cursor, self._lines(stream, cursor, stop), lambda _: tell())

    def _lines(self, stream: BinaryIO, cursor: ReadCursor, stop: float = math.inf) -> Iterator[_Placed]:
        share, offset, line, documents = cursor
        while offset < stop and (content := stream.readline(DOCUMENT_BYTES + 1)):
            line += 1
            size, is_long = len(content), len(content) > DOCUMENT_BYTES
            if is_long:
                size += _skip_line(stream, content)
            elif is_blank(content):
                offset += size
                continue
            offset += size
            documents += 1
            if self._is_chosen(share, documents - 1):
                yield LongLine(size) if is_long else content, size, offset, line, documents

    def _table_rows(self, share: Share, cursor: ReadCursor) -> Iterator[Batch]:
        """Name row groups for the workers to read; read those that are large, or of which only some rows are wanted."""
        source, columns = share.source, self._columns[share.source.dataset]
        with open_table(source, columns) as file:
            num_groups, row_group = file.num_row_groups, file.metadata.row_group
            starts = [0, *accumulate(row_group(group).num_rows for group in range(num_groups))]
            groups = [
                group
                for group in range(num_groups)
                if share.start <= source.bytes * group // num_groups < share.stop
                and starts[group + 1] > max(starts[group], cursor.offset)
            ]
            bytes_per_row = source.bytes / max(starts[-1], 1)

            named: list[int] = []
            size = 0
            for group in groups:
                here = cursor._replace(offset=max(cursor.offset, starts[group]))
                group_bytes = num_bytes(file, group, columns)
                is_all = self._chosen is None and here.offset == starts[group]
                is_named = is_all and group_bytes <= ROW_GROUP_BYTES
                if is_named:
                    named.append(group)
                    size += group_bytes
                if named and (not is_named or size >= BATCH_BYTES or group == groups[-1]):
                    first, stop = starts[named[0]], starts[named[-1] + 1]
                    content = RowGroups(range(named[0], named[-1] + 1), columns, first)
                    after = ReadCursor(cursor.share, stop, stop, stop)
                    file_bytes = int(stop * bytes_per_row) - int(first * bytes_per_row)
                    yield Batch(share, content, None, after, size, file_bytes)
                    named, size = [], 0
                if not is_named:
                    rows = self._rows(file, group, columns, here, starts[group])
                    yield from _batches(share, here, rows, lambda place: int(place.offset * bytes_per_row))

    def _rows(self, file: Any, group: int, columns: list[str], cursor: ReadCursor, first: int) -> Iterator[_Placed]:
        rows = rows_of(file, [group], columns, cursor.offset - first)
        for place, (row, size) in enumerate(rows, cursor.offset):
            if self._is_chosen(cursor.share, place):
                yield row, size, place + 1, place + 1, place + 1


def _batches(
    share: Share, cursor: ReadCursor, items: Iterator[_Placed], file_bytes: Callable[[ReadCursor], int]
) -> Iterator[Batch]:
    """Batch the items from `cursor` on; `file_bytes` returns how many bytes of the file have been read."""
    held: list[_Placed] = []
    size, last = 0, file_bytes(cursor)
    for item in chain(items, [None]):
        if held and (item is None or size >= BATCH_BYTES):
            content, _, offsets, lines, documents = zip(*held, strict=True)
            after = ReadCursor(cursor.share, offsets[-1], lines[-1], documents[-1])
            position = file_bytes(after)
            yield Batch(share, list(content), list(lines), after, size, position - last)
            held, size, last = [], 0, position
        if item is not None:
            held.append(item)
            size += item[1]


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


def _first_line(file: BinaryIO, share: Share) -> int:
    """Return where the first line of a share begins."""
    return _line_end(file, share.start - 1) if share.start else 0


def _line_end(file: BinaryIO, position: int) -> int:
    """Return the position after the first line feed at `position` or later, or the end of the file."""
    file.seek(position)
    while block := file.read(BLOCK_BYTES):
        if (end := block.find(b"\n")) >= 0:
            return position + end + 1
        position += len(block)
    return position


def _skip_line(stream: BinaryIO, piece: bytes) -> int:
    """Read the rest of a line that begins with `piece`, and return the number of its bytes."""
    num_bytes = 0
    while not piece.endswith(b"\n") and (piece := stream.readline(BLOCK_BYTES)):
        num_bytes += len(piece)
    return num_bytes
