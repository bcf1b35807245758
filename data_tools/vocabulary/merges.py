"""Continues the merges of a byte-pair encoding (BPE) on new text.

BPE (arXiv 1508.07909) repeatedly joins the most frequent pair of neighboring tokens into a new token. Here it starts
from words as the old tokenizer encodes them. A tokenizer applies merges in the order in which they were learned, so all
old merges come first, and a new one applies only where old merges leave its pair.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

# A pair of neighboring symbols, or a single character that has no token yet.
Candidate = tuple[int, ...]

_REMOVED = -(1 << 31)
_NONE = -1  # no neighbor


class NewToken(NamedTuple):
    """A token to be added."""

    text: str  # as the vocabulary writes it
    merge: tuple[str, str] | None  # the texts of the two tokens that it joins; None for a character
    replaces: list[int]  # IDs of the old tokens that wrote its text


class Character(NamedTuple):
    """A character without a token."""

    text: str
    replaces: list[int]  # IDs of the tokens of its bytes


class Words:
    """Distinct words as symbols, each linked to its neighbors, so that a merge takes as long as it has places.

    A symbol is the ID of a token or, if negative, a character that has no token.
    """

    def __init__(self, words: Iterable[tuple[list[int], int]]) -> None:
        self.counts: dict[Candidate, int] = defaultdict(int)
        self._symbols, self._before, self._after = array("i"), array("i"), array("i")
        self._weights = array("q")
        # Where a pair is, ascending, for leftmost places come first. Places that have changed since are skipped.
        self._places: dict[Candidate, array[int]] = defaultdict(lambda: array("i"))
        for symbols, weight in filter(lambda word: word[0], words):
            start = len(self._symbols)
            stop = start + len(symbols)
            self._symbols.extend(symbols)
            self._before.extend([_NONE, *range(start, stop - 1)])
            self._after.extend([*range(start + 1, stop), _NONE])
            self._weights.extend([weight] * len(symbols))
            for place, pair in enumerate(pairwise(symbols), start):
                self.counts[pair] += weight
                self._places[pair].append(place)
            for symbol in symbols:
                if symbol < 0:
                    self.counts[symbol,] += weight

    def drop(self, candidate: Candidate) -> None:
        """Forget a pair that will not be joined."""
        del self.counts[candidate]
        self._places.pop(candidate, None)

    def join(self, pair: Candidate, joined: int) -> set[Candidate]:
        """Replace a pair by one symbol wherever it occurs, and return the pairs that this creates."""
        left, right = pair
        symbols, before, after, counts = self._symbols, self._before, self._after, self.counts
        places = self._places.pop(pair)
        del counts[pair]
        created = set()

        def replace(old: Candidate, new: Candidate, place: int, weight: int) -> None:
            if old in counts:
                counts[old] -= weight
            counts[new] += weight
            self._places[new].append(place)
            created.add(new)

        for place in places:
            other = after[place]
            if symbols[place] != left or other == _NONE or symbols[other] != right:
                continue
            weight, previous, following = self._weights[place], before[place], after[other]
            symbols[place], symbols[other], after[place] = joined, _REMOVED, following
            if previous != _NONE:
                replace((symbols[previous], left), (symbols[previous], joined), previous, weight)
            if following != _NONE:
                before[following] = place
                replace((right, symbols[following]), (joined, symbols[following]), place, weight)
        return created


def continue_merges(
    words: Words,
    texts: dict[int, str],
    characters: dict[int, Character],
    first_new_id: int,
    min_count: int,
    is_allowed: Callable[[Candidate, str], bool],
) -> Iterator[NewToken]:
    """Yield new tokens, the one that saves most tokens first; of equal ones, that of the lowest IDs.

    Args:
        texts: Text of each token that exists, by ID.
        characters: Characters without a token, by symbol.
        min_count: How often a token must occur.
        is_allowed: Whether a pair may be joined, or a character may become a token, given the symbols and the text. A
            new token has the next ID.
    """
    texts, taken = dict(texts), set(texts.values())
    replaces = {id: [id] for id in texts}
    # A character has no ID until it becomes a token: it keeps its negative symbol, and pairs with it wait for it.
    waiting: dict[int, list[Candidate]] = defaultdict(list)
    heap: list[tuple[int, Candidate]] = []
    merge: tuple[str, str] | None
    next_id = first_new_id

    def saved(candidate: Candidate) -> int:
        """How many tokens a candidate saves."""
        count = words.counts.get(candidate, 0)
        if count < min_count:
            return 0
        return count if len(candidate) == 2 else count * (len(characters[candidate[0]].replaces) - 1)

    def consider(candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if saved(candidate):
                heappush(heap, (-saved(candidate), candidate))
            elif len(candidate) == 2 and candidate in words.counts:
                words.drop(candidate)

    consider(list(words.counts))
    while heap:
        before, candidate = heappop(heap)
        if -before != saved(candidate):
            consider([candidate])
            continue
        if len(candidate) == 1:
            (text, old), merge, symbol = characters[candidate[0]], None, candidate[0]
        elif (missing := next((symbol for symbol in candidate if symbol not in texts), None)) is not None:
            waiting[missing].append(candidate)
            continue
        else:
            left, right = candidate
            merge, symbol = (texts[left], texts[right]), next_id
            text, old = "".join(merge), replaces[left] + replaces[right]
        if text in taken or not is_allowed(candidate, text):
            words.drop(candidate)
            continue
        texts[symbol], replaces[symbol] = text, old
        taken.add(text)
        consider(words.join(candidate, symbol) if merge else waiting.pop(symbol, []))
        yield NewToken(text, merge, old)
        next_id += 1
