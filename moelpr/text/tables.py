"""Rows of Parquet files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moelpr.process.errors import UserError
from moelpr.text.sources import Source

_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20


@contextmanager
def open_table(source: Source, columns: list[str]) -> Iterator[Any]:
    """Open a file of which `columns` will be read.

    Raises:
        UserError: One of the columns is missing, or there several times.
    """
    from pyarrow import parquet

    # So a page of a row group is in memory at a time, not all of it.
    buffered: dict[str, Any] = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    with parquet.ParquetFile(source.path, page_checksum_verification=True, **buffered) as file:
        names = file.schema_arrow.names
        if repeated := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{source.path} has several columns {repeated[0]}; rename all but one")
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"{source.path} has no column {missing[0]}; its columns are {', '.join(names)[:200]}")
        yield file


def num_bytes(file: Any, group: int, columns: list[str]) -> int:
    """Return the unpacked size of columns, which may be nested, in a row group."""
    metadata = file.metadata.row_group(group)
    leaves = [metadata.column(index) for index in range(metadata.num_columns)]
    return sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] in columns)


def rows_of(file: Any, group: int, columns: list[str], start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows of a row group from `start` on, each with its size in memory.

    Text that is not UTF-8 becomes bytes, which are a malformed value of that row.
    """
    number = 0
    for table in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
        skipped = max(start - number, 0)
        number += len(table)
        for row in _python_rows(table[skipped:]):
            yield row, table.nbytes // len(table)


def _python_rows(table: Any) -> list[dict[str, Any]]:
    import pyarrow

    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        text = (pyarrow.string(), pyarrow.large_string())
        columns = [column.cast(pyarrow.binary()) if column.type in text else column for column in table.columns]
        binary = pyarrow.RecordBatch.from_arrays(columns, names=table.schema.names)
        rows = [_python_row(binary.slice(number, 1)) for number in range(len(binary))]
        return [{name: _decoded(value) for name, value in row.items()} for row in rows]


def _python_row(table: Any) -> dict[str, Any]:
    """The only row of a table, with bytes in place of its values if they are not UTF-8."""
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError:  # within a list
        return dict.fromkeys(table.schema.names, b"\xff")


def _decoded(value: Any) -> Any:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
