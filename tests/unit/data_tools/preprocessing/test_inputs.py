"""Samples are fair."""

from collections import Counter

from data_tools.preprocessing.batches import Share
from data_tools.preprocessing.inputs import sample_documents
from moelpr.data.text.sources import open_source


def test_each_document_has_the_same_chance(write_lines) -> None:
    """Over 2,000 seeds each of 20 documents in two files is drawn 500 times, give or take 5 standard deviations."""
    paths = [write_lines(f"{name}.jsonl", [{"text": "a"}] * count) for name, count in (("a", 12), ("b", 8))]
    sources = [open_source(str(path)) for path in paths]
    shares = [Share(source, 0, source.bytes) for source in sources]
    times: Counter[int] = Counter()
    for seed in range(2000):
        [first, second], notes = sample_documents(shares, ["name"], 5, seed)
        assert notes == [] and len(first) + len(second) == 5
        times.update([*first.tolist(), *(12 + second).tolist()])
    assert set(times) == set(range(20))
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in times.values())
