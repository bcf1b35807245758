"""Files of the forms that preprocessing reads."""

import io
from typing import Any

import pyarrow
from pyarrow import parquet


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def parquet_table(rows: list[dict[str, Any]], rows_per_group: int = 7) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=rows_per_group)
    return file.getvalue()
