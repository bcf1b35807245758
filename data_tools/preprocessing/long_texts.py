"""Texts of any length in bounded memory: cut into pieces where that provably changes no id.

A tokenizer takes a hundred times a text's size while it works. A piece therefore ends where cutting changes nothing:
where the text around the cut, encoded as a whole, is the ids of its left half and then those of its right half. That
window is longer than anything a tokenizer looks back or ahead for, a word or a run of white space.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.backends import Backend
from data_tools.preprocessing.documents import BadLine

LONG_TEXT_CHARACTERS = 1 << 20
_WINDOW_CHARACTERS = 1 << 13
_TRIES = 64
# Likely places: behind the end of a line, before or behind a space, behind the punctuation of scripts without spaces.
_BORDERS = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)|(?<=\S )(?=\S)|(?<=[。，！？；：、])|(?<=\w)(?=\W)|(?<=\W)(?=\w)")


def encode_long_text(backend: Backend, text: str) -> NDArray[np.int32]:
    """A text's ids, int32 [tokens]: those of encoding it as a whole.

    Raises:
        BadLine: it has a part of a million characters with no place where it could be cut.
    """
    pieces = [backend.encode([piece]).ids for piece in cut(backend, iter([text]))]
    return np.concatenate(pieces)


def cut(backend: Backend, parts: Iterable[str]) -> Iterator[str]:
    """Pieces of a text that comes in parts; their ids, one after another, are the text's.

    A space that a tokenizer puts before each text itself is left out at a piece's start.
    """
    ahead = ""
    for part in parts:
        ahead += part
        while len(ahead) > LONG_TEXT_CHARACTERS + 2 * _WINDOW_CHARACTERS:
            end, start = _place_to_cut(backend, ahead)
            yield ahead[:end]
            ahead = ahead[start:]
    yield ahead


def _place_to_cut(backend: Backend, text: str) -> tuple[int, int]:
    """Where the first piece ends and where the next one starts."""
    # From the right end on to the left, so that pieces are about as long as they may be.
    tried = 0
    for stop in range(LONG_TEXT_CHARACTERS, _WINDOW_CHARACTERS, -_WINDOW_CHARACTERS):
        begin = stop - _WINDOW_CHARACTERS
        for match in reversed(list(_BORDERS.finditer(text, begin, stop))[-8:]):
            border = match.start()
            for start in (border, border + 1) if text[border] == " " else (border,):
                if _changes_nothing(backend, text, border, start):
                    return border, start
            tried += 1
        if tried >= _TRIES:
            break
    raise BadLine(
        f"holds a text with {LONG_TEXT_CHARACTERS:,} characters that can't be cut for the tokenizer; split it"
    )


def _changes_nothing(backend: Backend, text: str, end: int, start: int) -> bool:
    left, right = text[end - _WINDOW_CHARACTERS : end], text[start : start + _WINDOW_CHARACTERS]
    whole = backend.encode([text[end - _WINDOW_CHARACTERS : start + _WINDOW_CHARACTERS]]).ids
    return np.array_equal(whole, backend.encode([left, right]).ids)
