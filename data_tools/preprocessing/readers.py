"""From files to batches of lines or rows, in order, with memory for a few batches."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.sources import Form, Share
from data_tools.preprocessing.streams import damage_told, open_stream
from moelpr.errors import UserError

# A batch is worth its way to a worker, and small beside what encoding it takes.
BATCH_BYTES = 1 << 19
# A longer line travels as a place in a file, never as a value.
LONG_LINE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 16
_ROWS_AT_ONCE = 64


class Place(NamedTuple):
    """Where reading goes on.

    Attributes:
        share: index of the share.
        offset: in the share's file: a byte of JSON lines (of their decompressed stream), or a row of Parquet.
        line: lines or rows of the share before it; of plain files nobody counts them.
        documents: lines that are not blank, or rows, among these.
    """

    share: int = 0
    offset: int = 0
    line: int = 0
    documents: int = 0


class LinesAt(NamedTuple):
    """Bytes [start, stop) of a file, which are whole lines; whoever needs them reads them."""

    path: str
    start: int
    stop: int
    is_temporary: bool = False

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class Batch(NamedTuple):
    """Lines or rows of one input file, as they are.

    Attributes:
        content: lines, or where lines are, or the rows of a table.
        numbers: of lines or rows in the share, from 1; None: they follow each other from 1.
        after: where reading goes on after it.
        num_bytes: of JSON or table, decompressed.
        file_bytes: of the file, for the progress.
    """

    share: Share
    content: list[bytes] | LinesAt | list[dict[str, Any]]
    numbers: list[int] | None
    after: Place
    num_bytes: int
    file_bytes: int

    @property
    def is_long_line(self) -> bool:
        """Whether it is a single line that is too long for memory."""
        return isinstance(self.content, LinesAt) and self.content.num_bytes > LONG_LINE_BYTES

    def items(self) -> Sequence[bytes | dict[str, Any]]:
        """The lines without what ends them, or the rows."""
        if not isinstance(self.content, LinesAt):
            return self.content
        with open(self.content.path, "rb") as file:
            file.seek(self.content.start)
            lines = file.read(self.content.num_bytes).split(b"\n")
        if not lines[-1]:
            lines.pop()
        return lines

    def where(self, index: int) -> str:
        """An item's place for a person, `index` in this batch; costs reading what lies before a plain file's share."""
        source, start, _ = self.share
        number = index + 1 if self.numbers is None else self.numbers[index]
        if source.form is Form.PARQUET:
            return f"{source.path}, row {number}"
        if source.form is Form.STREAM:
            return f"standard input:{number}"
        return f"{source.path}:{number + (lines_before(source.path, start) if start else 0)}"


class Reader:
    """Reads shares in batches.

    Args:
        shares: in order.
        columns: per dataset the columns that are needed of a Parquet file.
        chosen: per share the documents to read, counted from 0, ascending; None: all of them.
        spool: a folder for lines of compressed files that are too long for memory.
    """

    def __init__(
        self, shares: list[Share], columns: list[list[str]], chosen: list[NDArray[np.int64]] | None, spool: Path
    ) -> None:
        self._shares = shares
        self._columns = columns
        self._chosen = None if chosen is None else [set(documents.tolist()) for documents in chosen]
        self._spool = spool

    def batches(self, place: Place) -> Iterator[Batch]:
        """Batches from a place on.

        Raises:
            UserError: a file can't be read, or is damaged.
        """
        for index in range(place.share, len(self._shares)):
            share = self._shares[index]
            start = place if index == place.share else Place(index)
            with damage_told(share.source):
                if share.source.form is Form.PARQUET:
                    yield from self._rows(share, start)
                elif share.source.form is Form.LINES and self._chosen is None:
                    yield from self._plain_lines(share, start)
                else:
                    yield from self._stream_lines(share, start)

    def _is_chosen(self, share: int, document: int) -> bool:
        return self._chosen is None or document in self._chosen[share]

    def _plain_lines(self, share: Share, place: Place) -> Iterator[Batch]:
        """Only the ends of batches are looked for here; the workers read what lies between."""
        path = share.source.path
        with open(path, "rb") as file:
            position = place.offset or first_line_at(file, share.start)
            while position < share.stop:
                stop = _line_end(file, min(position + BATCH_BYTES, share.stop) - 1)
                borders = [position, stop]
                if stop - position > LONG_LINE_BYTES:  # its last line is a long one, which goes alone
                    file.seek(position)
                    borders.insert(1, position + file.read(BATCH_BYTES).rfind(b"\n") + 1)
                for start, end in zip(borders[:-1], borders[1:], strict=True):
                    if start < end:
                        after = place._replace(offset=end)
                        here = Share(share.source, start, end)
                        yield Batch(here, LinesAt(path, start, end), None, after, end - start, end - start)
                position = stop

    def _stream_lines(self, share: Share, place: Place) -> Iterator[Batch]:
        index, offset, line, documents = place
        lines: list[bytes] = []
        numbers: list[int] = []
        with open_stream(share.source) as (stream, tell):
            told = tell()
            _skip(stream, offset)

            def batch(content: list[bytes] | LinesAt, num_bytes: int) -> Batch:
                nonlocal told, lines, numbers
                before, told = told, tell()
                made = Batch(share, content, numbers, Place(index, offset, line, documents), num_bytes, told - before)
                lines, numbers = [], []
                return made

            size = 0
            while content := stream.readline(LONG_LINE_BYTES):
                is_long = len(content) == LONG_LINE_BYTES and not content.endswith(b"\n")
                if (is_long or size >= BATCH_BYTES) and lines:
                    yield batch(lines, size)
                    size = 0
                long_line = self._spool_line(content, stream, index, line) if is_long else None
                offset += long_line.num_bytes if long_line else len(content)
                line += 1
                is_document = is_long or not content.isspace()
                documents += is_document
                if is_document and self._is_chosen(index, documents - 1):
                    numbers.append(line)
                    if long_line is not None:
                        yield batch(long_line, long_line.num_bytes)
                    else:
                        lines.append(content)
                        size += len(content)
            if lines:
                yield batch(lines, size)

    def _spool_line(self, start: bytes, stream: BinaryIO, share: int, line: int) -> LinesAt:
        path = self._spool / f"line-{share}-{line}"
        with open(path, "wb") as file:
            piece = start
            while piece:
                file.write(piece)
                piece = b"" if piece.endswith(b"\n") else stream.readline(_BLOCK_BYTES)
            return LinesAt(str(path), 0, file.tell(), is_temporary=True)

    def _rows(self, share: Share, place: Place) -> Iterator[Batch]:
        from pyarrow import parquet

        source = share.source
        with parquet.ParquetFile(source.path) as file:
            columns = self._columns[source.dataset]
            names = file.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise UserError(f"{source.path} has no column {missing[0]}; its columns are {', '.join(names)[:200]}")
            rows: list[dict[str, Any]] = []
            numbers: list[int] = []
            size, number = 0, 0
            bytes_per_row = source.bytes / max(file.metadata.num_rows, 1)
            done = place.offset
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if number + num_rows <= place.offset:
                    number += num_rows
                    continue
                for table in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                    is_new = number + len(table) > place.offset
                    for row in table.to_pylist() if is_new else ():
                        number += 1
                        if number > place.offset and self._is_chosen(place.share, number - 1):
                            rows.append(row)
                            numbers.append(number)
                    number += 0 if is_new else len(table)
                    size += table.nbytes if is_new else 0
                    if size >= BATCH_BYTES:
                        after = place._replace(offset=number)
                        yield Batch(share, rows, numbers, after, size, int((number - done) * bytes_per_row))
                        rows, numbers, size, done = [], [], 0, number
            if rows:
                after = place._replace(offset=number)
                yield Batch(share, rows, numbers, after, size, int((number - done) * bytes_per_row))


def count_documents(share: Share) -> int:
    """Lines that are not blank, or rows, of a whole file, which is read for it.

    Raises:
        UserError: it can't be read, or is damaged.
    """
    with damage_told(share.source):
        if share.source.form is Form.PARQUET:
            from pyarrow import parquet

            num_rows: int = parquet.read_metadata(share.source.path).num_rows
            return num_rows
        with open_stream(share.source) as (stream, _):
            documents, at_line_start = 0, True
            while piece := stream.readline(_BLOCK_BYTES):
                documents += at_line_start and not piece.isspace()
                at_line_start = piece.endswith(b"\n")
            return documents


def first_line_at(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at `start` or later; its position."""
    return 0 if start == 0 else _line_end(file, start - 1)


@functools.cache
def lines_before(path: str, start: int) -> int:
    """Lines of a file that begin before byte `start`, where one begins."""
    with open(path, "rb") as file:
        lines, left = 0, start
        while left and (piece := file.read(min(left, 1 << 20))):
            lines += piece.count(b"\n")
            left -= len(piece)
        return lines


def _line_end(file: BinaryIO, position: int) -> int:
    """Behind the first line feed at `position` or later, or the end of the file."""
    file.seek(position)
    while block := file.read(_BLOCK_BYTES):
        if (found := block.find(b"\n")) >= 0:
            return position + found + 1
        position += len(block)
    return position


def _skip(stream: BinaryIO, offset: int) -> None:
    while offset and (piece := stream.read(min(offset, 1 << 20))):
        offset -= len(piece)
    if offset:
        raise EOFError("it has become shorter since the run that is resumed")
