"""The part of the input files that belongs to one of the jobs that share them."""

from collections.abc import Iterator
from typing import NamedTuple

from moelpr.text.sources import Form, Source


class Share(NamedTuple):
    """A part of a source: the JSON lines that begin in bytes [start, stop), or all of a file of any other form."""

    source: Source
    start: int
    stop: int


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
