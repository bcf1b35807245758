"""Files of the forms that preprocessing reads."""

import bz2
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow
from pyarrow import parquet


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def parquet_table(rows: list[dict[str, Any]], rows_per_group: int = 7) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=rows_per_group)
    return file.getvalue()


# Suffix → how JSON lines become such a file.
PACK: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": bytes,
    "jsonl.gz": gzip.compress,
    "jsonl.bz2": bz2.compress,
    "jsonl.zst": zstd,
    "parquet": lambda data: parquet_table([json.loads(line) for line in data.splitlines()], 100),
}
