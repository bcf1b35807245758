"""The part of the input files that belongs to one of the jobs that share them."""

from collections.abc import Iterator
from typing import NamedTuple

from moelpr.data.text.sources import Form, Source


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
