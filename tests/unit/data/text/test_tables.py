"""Row groups are read by pages, so that one may be larger than memory."""

import random
from pathlib import Path

import pyarrow
from pyarrow import parquet

from moelpr.data.text.sources import open_source
from moelpr.data.text.tables import open_table, rows_of


def test_a_row_group_takes_the_memory_of_pages(tmp_path: Path) -> None:
    """It has 65 MB here; pyarrow holds 19 MB meanwhile, as of one of 16 MB."""
    text, path = random.Random(0).randbytes(1 << 13).hex(), tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} {text}" for number in range(4000)]})
    parquet.write_table(table, path, use_dictionary=False, row_group_size=4000)
    size = table.nbytes
    del table
    before = pyarrow.total_allocated_bytes()
    with open_table(open_source(str(path)), ["text"]) as file:
        assert file.num_row_groups == 1
        held = [pyarrow.total_allocated_bytes() - before for _ in rows_of(file, [0], ["text"])]
    assert len(held) == 4000 and max(held) < size / 3
