from collections import Counter

import numpy as np

from data_tools.vocabulary.counting import OriginalText, PairCounts
from data_tools.vocabulary.extension import OriginalTextGuard

FIRST_NEW = 100


def original(
    pairs: dict[tuple[int, int], int], whole: dict[str, int] | None = None, documents: int = 10
) -> OriginalText:
    counts = PairCounts(FIRST_NEW)
    for (left, right), count in pairs.items():
        counts.add(np.array([left * FIRST_NEW + right]), np.array([count]))
    return OriginalText(counts, Counter(whole), documents)


def test_pairs_of_original_text_are_refused_and_those_of_its_held_out_part_are_counted() -> None:
    guard = OriginalTextGuard(FIRST_NEW, original({(1, 2): 5}), original({(1, 2): 5, (3, 4): 2}), 0.0)
    assert not guard.allows((1, 2), "ab")
    assert not guard.allows((3, 4), "cd")
    assert guard.allows((2, 1), "ba")
    assert guard.allows((1, FIRST_NEW), "ax") and guard.allows((-2, 1), "λa")
    assert guard.unforeseen == 2


def test_words_and_characters_that_are_taken_whole_are_refused() -> None:
    guard = OriginalTextGuard(FIRST_NEW, original({}, {"λ": 1}), original({}), 0.0)
    assert not guard.allows((-2,), "λ")
    assert not guard.allows((FIRST_NEW, 1), "λ")
    assert guard.allows((-3,), "μ")


def test_a_share_of_documents_may_change_in_total() -> None:
    guard = OriginalTextGuard(FIRST_NEW, original({(1, 2): 2, (3, 4): 2, (5, 6): 1}), original({}), 0.15)
    assert [guard.allows(pair, "") for pair in ((1, 2), (3, 4), (5, 6))] == [True, False, True]
