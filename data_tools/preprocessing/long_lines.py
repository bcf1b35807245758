"""Lines too long for memory: their JSON without its long strings, and those strings a part at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_tools.preprocessing.readers import LONG_LINE_BYTES, LinesAt
from moelpr.documents import BadLine

_BLOCK_BYTES = 1 << 20
_LONG_STRING_BYTES = 1 << 20
# What a string holds up to its end or the block's, an escape as a whole.
_INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
# The same of characters, where an escaped surrogate pair is one escape.
_HEX = "[0-9a-fA-F]"
_WHOLE_ESCAPES = re.compile(
    rf"(?:[^\\]+|\\[^u]|\\u(?![dD][89abAB]){_HEX}{{4}}|\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}})*"
)


class LongString(NamedTuple):
    """A string of a JSON line: bytes [start, stop) of a file, without the quotes."""

    path: str
    start: int
    stop: int

    def parts(self) -> Iterator[str]:
        """Its text, a million bytes at a time.

        Raises:
            BadLine: it is no UTF-8, no JSON, or no text.
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
                    whole = _WHOLE_ESCAPES.match(ahead)
                    assert whole is not None  # it matches nothing, too
                    stop = whole.end() if left else len(ahead)
                    text: str = json.loads(f'"{ahead[:stop]}"')
                    text.encode("utf-8")
                except UnicodeDecodeError:
                    raise BadLine("invalid UTF-8 in a long text") from None
                except UnicodeEncodeError:
                    raise BadLine("a long text holds half a surrogate pair") from None
                except json.JSONDecodeError as error:
                    raise BadLine(f"not JSON ({error.msg} in a long text)") from None
                if len(ahead) - stop > 16:
                    raise BadLine("a long text holds half a surrogate pair or an escape that JSON doesn't know")
                ahead = ahead[stop:]
                yield text


def without_long_strings(line: LinesAt) -> tuple[bytes, dict[str, LongString]]:
    """A line's JSON with names in the place of long strings, and the strings by these names.

    Raises:
        BadLine: what is left is too long for memory.
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
            reason = "NUL bytes" if b"\0" in kept[-1] else "most of which is no long text"
            raise BadLine(f"a line of {line.num_bytes:,} bytes, {reason}")
    return b"".join(kept), found


def _pieces(line: LinesAt) -> Iterator[bytes | LongString]:
    """What lies between strings, white space shortened; short strings with their quotes; and long strings."""
    with open(line.path, "rb") as file:
        file.seek(line.start)
        block_start, left = line.start, line.num_bytes
        string_start: int | None = None  # in the file, behind the opening quote
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
                assert inside is not None  # it matches nothing, too
                stop = inside.end()
                if block_start + stop - string_start <= _LONG_STRING_BYTES:
                    short.append(block[place:stop])
                place = stop
                if place < len(block) and block[place : place + 1] == b'"':
                    if block_start + stop - string_start > _LONG_STRING_BYTES:
                        yield LongString(line.path, string_start, block_start + stop)
                    else:
                        yield b'"' + b"".join(short) + b'"'
                    string_start = None
                    place += 1
                else:
                    break  # the block ends inside the string, perhaps behind half an escape
            ahead = block[place:]
            block_start += place
            if is_last:
                if string_start is not None:
                    raise BadLine("not JSON (Unterminated string)")
                return
