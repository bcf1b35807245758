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
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.inputs import LONG_LINE_BYTES, FileRange
from data_tools.preprocessing.tokenizers import Backend
from moelpr.documents import BadLine

LONG_TEXT_CHARACTERS = 1 << 20
_WINDOW_CHARACTERS = 1 << 13  # on which two pieces must agree
_OVERLAP_WINDOWS = 8
_BLOCK_BYTES = 1 << 20
_LONG_STRING_BYTES = 1 << 20
# The content of a string up to its end or the end of the block, never ending inside an escape.
_INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
# The same for characters, where an escaped surrogate pair counts as one escape.
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
    """Replace the long strings of a line's JSON by names.

    Returns:
        The JSON with names, and the strings by name.

    Raises:
        BadLine: The rest is still too long for memory.
    """
    kept: list[bytes] = []
    found: dict[str, LongString] = {}
    size = 0
    for piece in _pieces(line):
        if isinstance(piece, bytes):
            kept.append(piece)
        else:
            name = f"\0long string {len(found)}"
            found[name] = piece
            kept.append(json.dumps(name).encode())
        size += len(kept[-1])
        if size > LONG_LINE_BYTES:
            reason = "NUL bytes" if b"\0" in kept[-1] else "most of which is not a long text"
            raise BadLine(f"a line of {line.num_bytes:,} bytes, {reason}")
    return b"".join(kept), found


def _pieces(line: FileRange) -> Iterator[bytes | LongString]:
    """Yield what is between strings, with white space shortened; short strings with their quotes; and long strings."""
    with open(line.path, "rb") as file:
        file.seek(line.start)
        block_start, left = line.start, line.num_bytes
        string_start: int | None = None  # in the file, after the opening quote
        short: list[bytes] = []
        ahead = b""
        while left or ahead:
            block = ahead + file.read(min(_BLOCK_BYTES, left))
            is_last = block_start + len(block) >= line.stop
            left = line.stop - block_start - len(block)
            place = 0
            while place < len(block):
                if string_start is None:
                    quote = block.find(b'"', place)
                    stop = len(block) if quote < 0 else quote
                    yield re.sub(rb"\s+", b" ", block[place:stop])
                    place = stop
                    if quote >= 0:
                        place += 1
                        string_start, short = block_start + place, []
                    continue
                inside = _INSIDE.match(block, place)
                assert inside is not None  # it also matches nothing
                stop = inside.end()
                is_long = block_start + stop - string_start > _LONG_STRING_BYTES
                if not is_long:
                    short.append(block[place:stop])
                place = stop
                if block[place : place + 1] != b'"':
                    break  # the block ends inside the string, perhaps inside an escape
                yield LongString(line.path, string_start, block_start + stop) if is_long else b'"%b"' % b"".join(short)
                string_start = None
                place += 1
            ahead = block[place:]
            block_start += place
            if is_last:
                if string_start is not None:
                    raise BadLine("not JSON (Unterminated string)")
                return


class Piece(NamedTuple):
    """Tokens of a part of a text: IDs and the characters of the complete text that they begin at, [tokens] each."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]


def is_long(text: str) -> bool:
    """Return whether a text must be encoded in pieces."""
    return len(text) > LONG_TEXT_CHARACTERS


def encode_long_text(backend: Backend, parts: Iterable[str]) -> Iterator[Piece]:
    """Yield the tokens of a text that comes in parts, in pieces that depend only on the text.

    Raises:
        BadLine: A part of the text can't be encoded in pieces.
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
    """Return freed memory to the system: glibc keeps it, in holes that grow from piece to piece."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in other C libraries
    if trim is not None:
        trim(0)


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
