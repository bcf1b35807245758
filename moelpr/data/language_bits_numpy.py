"""The functions of csrc/language_bits.cpp in NumPy, for an installation without a compiler, with the same results."""

import numpy as np
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]
_BLOCK_BYTES = 1 << 20


def _check_range(packed: _Bytes, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= 8 * packed.size:
        raise IndexError(f"bits [{start}, {stop}) are outside {packed.size} bytes")


def pack_into(packed: _Bytes, start: int, flags: _Bytes) -> int:
    """Write flags at `start` into bytes whose bits from there on are 0; return how many are 1."""
    if not 0 <= start <= 8 * packed.size - flags.size:
        raise IndexError(f"{flags.size} bits at {start} do not fit {packed.size} bytes")
    if flags.max(initial=0) > 1:
        raise ValueError("language bits must be 0 or 1")
    written = np.packbits(np.concatenate([np.zeros(start % 8, np.uint8), flags]), bitorder="little")
    packed[start // 8 : start // 8 + written.size] |= written
    return int(np.count_nonzero(flags))


def tag(packed: _Bytes, edges: list[int], ids: NDArray[np.int64]) -> tuple[_Bytes, int]:
    """Return a sample's bits, of the ranges between `edges`, then 0, and its largest ID."""
    bits, done = np.zeros(ids.size, np.uint8), 0
    for start, stop in zip(edges[::2], edges[1::2], strict=False):
        _check_range(packed, start, stop)
        if stop - start > ids.size - done:
            raise IndexError("more bits than token ids")
        unpacked = np.unpackbits(packed[start // 8 : (stop + 7) // 8], bitorder="little")
        bits[done : done + stop - start] = unpacked[start % 8 :][: stop - start]
        done += stop - start
    return bits, int(ids.max(initial=-1))


def count_ones(packed: _Bytes, start: int, stop: int) -> int:
    """Return the number of ones among bits [start, stop)."""
    _check_range(packed, start, stop)
    first, end = start // 8, (stop + 7) // 8
    blocks = (packed[place : min(place + _BLOCK_BYTES, end)] for place in range(first, end, _BLOCK_BYTES))
    before = np.unpackbits(packed[first : first + 1], bitorder="little")[: start % 8]
    behind = np.unpackbits(packed[end - 1 : end], bitorder="little")[stop % 8 or 8 :]
    return sum(int(np.bitwise_count(block).sum()) for block in blocks) - int(before.sum()) - int(behind.sum())
