"""Shards share the files: every line and every archive is read once."""

import pytest

from data_tools.preprocessing.shares import Share, shares_of
from moelpr.data.text.sources import Form, Source


@pytest.mark.parametrize("num_shards", [1, 2, 5, 40])
def test_shards_cover_all_lines_and_every_archive_once(num_shards: int) -> None:
    forms = [Form.LINES, Form.GZIP, Form.LINES, Form.PARQUET, Form.ZSTD]
    sources = [
        Source(f"{index}", form, size) for index, (form, size) in enumerate(zip(forms, (50, 9, 0, 31, 10), strict=True))
    ]
    shares = [share for shard in range(num_shards) for share in shares_of(sources, shard, num_shards)]
    archives = [source for source in sources if source.form in (Form.GZIP, Form.ZSTD)]
    assert [share for share in shares if share.source in archives] == [Share(file, 0, file.bytes) for file in archives]
    for name, size in (("0", 50), ("3", 31)):
        split = [(share.start, share.stop) for share in shares if share.source.path == name]
        assert split[0][0] == 0 and split[-1][1] == size
        assert all(stop == start for (_, stop), (start, _) in zip(split[:-1], split[1:], strict=True))
    assert [share.source.path for share in shares] == sorted(share.source.path for share in shares)
