from collections import Counter

import numpy as np
import pytest

from data_tools.vocabulary import counting
from data_tools.vocabulary.counting import NewText, PairCounts, distinct_pairs


def test_pairs_of_a_text_are_distinct() -> None:
    assert distinct_pairs(np.array([1, 2, 1, 2, 3, 4], np.int32), 10).tolist() == [12, 21, 23, 34]
    assert not len(distinct_pairs(np.zeros(0, np.int32), 10))


def test_the_rarest_words_are_forgotten_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "MAX_WORDS", 3)
    counted = NewText()
    counted.add(NewText(Counter(a=5, b=1, c=1), bytes=7))
    assert counted.words == {"a": 5, "b": 1, "c": 1}
    counted.add(NewText(Counter(c=1, d=3), bytes=4, held_out=1))
    assert (counted.words, counted.bytes, counted.held_out) == ({"a": 5, "c": 2, "d": 3}, 11, 1)


def test_pair_counts_add_up_over_batches() -> None:
    counts = PairCounts(100)
    for _ in range(3):
        counts.add(np.array([102, 509, 709]), np.array([1, 2, 3]))
    assert [counts.documents_with(*pair) for pair in ((1, 2), (5, 9), (7, 9), (9, 9), (0, 0))] == [3, 6, 9, 0, 0]
    assert PairCounts(100).documents_with(1, 2) == 0
