"""Texts of any length in bounded memory: encoded in overlapping pieces, which have the ids of the whole.

A tokenizer takes a hundred times a text's size while it works, so a long one is encoded a million characters at a time.
A piece begins well before the one before it ends. Somewhere in this overlap both have found the same tokens at the same
characters for thousands of characters on end; there the second takes over. What a tokenizer sees less of at the ends of
a piece (a word, a run of white space, the space some put before a text) has had no effect by then, as nothing that it
looks at is that long. Where there is no such place, the text is refused.
"""

import ctypes
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.backends import Backend
from moelpr.documents import BadLine

LONG_TEXT_CHARACTERS = 1 << 20
_WINDOW_CHARACTERS = 1 << 13  # that must agree
_OVERLAP_WINDOWS = 8


class Piece(NamedTuple):
    """Tokens of a part of a text: ids and, in the whole text, the characters they begin at, [tokens] each."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]


def encode_long_text(backend: Backend, parts: Iterable[str]) -> Iterator[Piece]:
    """The tokens of a text that comes in parts, in pieces that depend on the text only.

    Raises:
        BadLine: it has a part that can't be encoded in pieces.
    """
    held, first = None, 0
    for begin, characters in _overlapping(parts):
        ids, starts = backend.encode_with_starts(characters)
        piece = Piece(ids, starts + begin)
        if held is not None:
            last, next_first = _handover(held, piece, begin)
            yield Piece(held.ids[first:last], held.starts[first:last])
            first = next_first
        held = piece
        _return_freed_memory()
    if held is not None:
        yield Piece(held.ids[first:], held.starts[first:])


def _return_freed_memory() -> None:
    """Give back what a piece's work has freed: glibc keeps it, in holes that grow from piece to piece."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _overlapping(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Pieces of LONG_TEXT_CHARACTERS with the characters they begin at; each overlaps the one before."""
    step = LONG_TEXT_CHARACTERS - _OVERLAP_WINDOWS * _WINDOW_CHARACTERS
    begin, ahead = 0, ""
    for part in parts:
        ahead += part
        start = 0
        while len(ahead) - start > LONG_TEXT_CHARACTERS:
            yield begin, ahead[start : start + LONG_TEXT_CHARACTERS]
            start += step
            begin += step
        ahead = ahead[start:]
    yield begin, ahead


def _handover(left: Piece, right: Piece, begin: int) -> tuple[int, int]:
    """The token of `left` that is left out first, and the token of `right` that takes its place."""
    half = _WINDOW_CHARACTERS // 2
    for window in range(1, _OVERLAP_WINDOWS):
        place = begin + window * _WINDOW_CHARACTERS
        borders = [place - half, place, place + half]
        first_left, at_left, last_left = np.searchsorted(left.starts, borders).tolist()
        first_right, at_right, last_right = np.searchsorted(right.starts, borders).tolist()
        same_ids = np.array_equal(left.ids[first_left:last_left], right.ids[first_right:last_right])
        same_starts = np.array_equal(left.starts[first_left:last_left], right.starts[first_right:last_right])
        if same_ids and same_starts and at_left < last_left:
            return at_left, at_right
    raise BadLine(
        f"a text with {_OVERLAP_WINDOWS * _WINDOW_CHARACTERS:,} characters without a place where the tokenizer begins "
        f"afresh; split it, or leave it out"
    )
