"""Merges against a trainer that counts everything again for every token."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from data_tools.vocabulary.merges import Candidate, Character, NewToken, Words, continue_merges

TEXTS = {0: "a", 1: "b", 2: "c", 3: "ab"}
CHARACTERS = {-2: Character("λ", [4, 5]), -3: Character("ア", [6, 7, 8])}
Word = tuple[list[int], int]

words_and_weights = st.lists(
    st.tuples(st.lists(st.sampled_from([*TEXTS, *CHARACTERS]), max_size=9), st.integers(1, 4)), max_size=8
)
refused_texts = st.sets(st.text("abcλア", min_size=1, max_size=3), max_size=6)


def join(symbols: list[int], pair: Candidate, joined: int) -> list[int]:
    result, place = [], 0
    while place < len(symbols):
        if tuple(symbols[place : place + 2]) == pair:
            result.append(joined)
            place += 2
        else:
            result.append(symbols[place])
            place += 1
    return result


def naive_merges(words: list[Word], min_count: int, refused: set[str]) -> list[NewToken]:
    texts, replaces, actual = dict(TEXTS), {id: [id] for id in TEXTS}, []
    while True:
        counts: Counter[Candidate] = Counter()
        for symbols, weight in words:
            for pair in pairwise(symbols):
                counts[pair] += weight
            for symbol in symbols:
                if symbol not in texts:
                    counts[symbol,] += weight
        options = []
        for candidate, count in counts.items():
            if len(candidate) == 1:
                text, old = CHARACTERS[candidate[0]]
                gain = count * (len(old) - 1)
            elif all(symbol in texts for symbol in candidate):
                text, gain = "".join(texts[symbol] for symbol in candidate), count
            else:
                continue
            if count >= min_count and text not in refused and text not in texts.values():
                options.append((-gain, candidate, text))
        if not options:
            return actual
        _, candidate, text = min(options)
        if len(candidate) == 1:
            texts[candidate[0]], replaces[candidate[0]] = CHARACTERS[candidate[0]]
            actual.append(NewToken(text, None, replaces[candidate[0]]))
            continue
        id = 10 + len(actual)
        merge = texts[candidate[0]], texts[candidate[1]]
        texts[id], replaces[id] = text, [*replaces[candidate[0]], *replaces[candidate[1]]]
        actual.append(NewToken(text, merge, replaces[id]))
        words = [(join(symbols, candidate, id), weight) for symbols, weight in words]


@given(words_and_weights, st.integers(1, 3), refused_texts)
def test_merges_are_those_of_the_naive_trainer(words: list[Word], min_count: int, refused: set[str]) -> None:
    actual = continue_merges(Words(words), TEXTS, CHARACTERS, 10, min_count, lambda _, text: text not in refused)
    assert list(actual) == naive_merges(words, min_count, refused)


def test_a_character_that_is_a_token_already_gets_no_other_id() -> None:
    """Users add missing characters as tokens."""
    words = [([-2, 0], 5), ([-3, 0], 4)]
    merges = continue_merges(Words(words), TEXTS | {4: "λ"}, CHARACTERS, 10, 1, lambda *_: True)
    texts = [token.text for token in merges]
    assert "λ" not in texts and "ア" in texts
