"""Documents too long for memory: their JSON without its long strings, those strings in parts, and the parts' tokens.

A tokenizer needs about a hundred times a text's size while it works, so a long text is encoded a million characters at
a time, in overlapping pieces. The next piece takes over where both have found the same tokens at the same characters
for thousands of characters. What a tokenizer misses at the ends of a piece (a word, a run of white space, the space
that some add before a text) has no effect there, because nothing that it looks at is that long. A text without such a
place is rejected.
"""

import codecs
import ctypes
import json
import mmap
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_tools.preprocessing.batches import LONG_LINE_BYTES, FileRange
from moelpr.data.text.documents import BadLine
from moelpr.data.tokenizers.base import Piece, Tokenizer

LONG_TEXT_CHARACTERS = 1 << 20
_WINDOW_CHARACTERS = 1 << 13  # on which two pieces must agree
_OVERLAP_WINDOWS = 8
_BLOCK_BYTES = 1 << 20
_LONG_STRING_BYTES = 1 << 20
# A string, perhaps without an end, or up to a million bytes between strings. Possessive, so it needs no memory.
_PARTS = re.compile(rb'"(?P<inside>[^"\\]*+(?:\\.[^"\\]*+)*+)(?P<end>"?)|[^"]{1,1048576}', re.DOTALL)
# What can be decoded on its own; an escaped surrogate pair counts as one escape.
_HEX = "[0-9a-fA-F]"
_COMPLETE_ESCAPES = re.compile(
    rf"(?:[^\\]+|\\[^u]|\\u(?![dD][89abAB]){_HEX}{{4}}|\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}})*"
)


class LongString(NamedTuple):
    """A string of a JSON line: bytes [start, stop) of a file, without the quotes."""

    path: str
    start: int
    stop: int

    def parts(self) -> Iterator[str]:
        """Yield its text, about a million bytes at a time.

        Raises:
            BadLine: It is not valid UTF-8, JSON or text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        ahead, left = "", self.stop - self.start
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while left:
                block = file.read(min(_BLOCK_BYTES, left))
                left -= len(block)
                try:
                    ahead += decoder.decode(block, final=not left)
                    complete = _COMPLETE_ESCAPES.match(ahead)
                    assert complete is not None  # it also matches nothing
                    stop = complete.end() if left else len(ahead)
                    text: str = json.loads(f'"{ahead[:stop]}"')
                    text.encode("utf-8")
                except UnicodeDecodeError:
                    raise BadLine("invalid UTF-8 in a long text") from None
                except UnicodeEncodeError:
                    raise BadLine("a long text contains half a surrogate pair") from None
                except json.JSONDecodeError as error:
                    raise BadLine(f"not JSON ({error.msg} in a long text)") from None
                if len(ahead) - stop > 16:
                    raise BadLine("a long text contains half a surrogate pair or an invalid JSON escape")
                ahead = ahead[stop:]
                yield text


def without_long_strings(line: FileRange) -> tuple[bytes, dict[str, LongString]]:
    """Return a line's JSON with white space shortened and long strings replaced by names, and the strings by name.

    Raises:
        BadLine: The rest is still too long for memory, or a string has no end.
    """
    kept: list[bytes] = []
    found: dict[str, LongString] = {}
    size = 0
    with open(line.path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for part in _PARTS.finditer(content, line.start, line.stop):
        start, stop = part.span("inside")
        if part["end"] is None:
            kept.append(re.sub(rb"\s+", b" ", part[0]))
        elif not part["end"]:
            raise BadLine("not JSON (Unterminated string)")
        elif stop - start > _LONG_STRING_BYTES:
            name = f"\0long string {len(found)}"
            found[name] = LongString(line.path, start, stop)
            kept.append(json.dumps(name).encode())
        else:
            kept.append(part[0])
        size += len(kept[-1])
        if size > LONG_LINE_BYTES:
            reason = "NUL bytes" if b"\0" in kept[-1] else "most of which is not a long text"
            raise BadLine(f"a line of {line.num_bytes:,} bytes, {reason}")
    return b"".join(kept), found


def encode_long_text(tokenizer: Tokenizer, parts: Iterable[str]) -> Iterator[Piece]:
    """Yield the tokens of a text that comes in parts, in pieces that depend only on the text.

    Raises:
        BadLine: A part of the text can't be encoded in pieces.
    """
    held, first = None, 0
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # not in C libraries other than glibc
    for begin, characters in _overlapping(parts):
        piece = tokenizer.encode_with_starts(characters)
        piece = piece._replace(starts=piece.starts + begin)
        if held is not None:
            last, next_first = _handover(held, piece, begin)
            yield Piece(held.ids[first:last], held.starts[first:last])
            first = next_first
        held = piece
        malloc_trim(0)  # glibc keeps freed memory, in holes that grow from piece to piece
    if held is not None:
        yield Piece(held.ids[first:], held.starts[first:])


def _overlapping(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield overlapping pieces of LONG_TEXT_CHARACTERS with the characters they begin at."""
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
    """Return the first token of `left` to omit, and the token of `right` that replaces it."""
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
        f"a text with {_OVERLAP_WINDOWS * _WINDOW_CHARACTERS:,} characters in which the tokenizer can't be restarted; "
        "split or remove it"
    )
