"""Rows of Parquet files."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from moelpr.base.errors import UserError
from moelpr.data.text.sources import Source

_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20


@contextmanager
def open_table(source: Source, columns: list[str], texts: Sequence[str] = ()) -> Iterator[Any]:
    """Open a file of which `columns` will be read.

    Args:
        texts: Columns that must be text.

    Raises:
        UserError: One of the columns is missing, there several times, or of another type.
    """
    from pyarrow import parquet

    # So a page of a row group is in memory at a time, not all of it.
    options = {"page_checksum_verification": True, "buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    with (
        nullcontext(source.file) if source.is_local else source.open() as opened,
        parquet.ParquetFile(opened, **options) as file,
    ):
        names = file.schema_arrow.names
        if repeated := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{source.path} has several columns {repeated[0]}; rename all but one")
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"{source.path} has no column {missing[0]}; its columns are {', '.join(names)[:200]}")
        kinds = {name: file.schema_arrow.field(name).type for name in texts} if file.metadata.num_rows else {}
        if others := [name for name, kind in kinds.items() if not _is_text(kind)]:
            raise UserError(
                f"{source.path} has a column {others[0]} of the type {str(kinds[others[0]])[:80]}, not of text; name "
                "another column, or convert or omit the file"
            )
        yield file


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def num_bytes(file: Any, group: int, columns: list[str]) -> int:
    """Return the unpacked size of columns, which may be nested, in a row group."""
    metadata = file.metadata.row_group(group)
    leaves = [metadata.column(index) for index in range(metadata.num_columns)]
    return sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] in columns)


def rows_of(
    file: Any, groups: Iterable[int], columns: list[str], start: int = 0
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows of row groups from `start` on, each with its size in memory."""
    number = 0
    for table in file.iter_batches(_ROWS_AT_ONCE, row_groups=list(groups), columns=columns, use_threads=False):
        skipped = max(start - number, 0)
        number += len(table)
        for row in table[skipped:].to_pylist():
            yield row, table.nbytes // len(table)
