"""The functions of csrc/language_bits.cpp in NumPy, for an installation without a compiler, with the same results."""

import numpy as np
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]
_BLOCK_TOKENS = 1 << 23


def _unpack(packed: _Bytes, start: int, stop: int) -> _Bytes:
    if not 0 <= start <= stop <= 8 * packed.size:
        raise IndexError(f"bits [{start}, {stop}) are outside {packed.size} bytes")
    return np.unpackbits(packed[start // 8 : (stop + 7) // 8], bitorder="little")[start % 8 :][: stop - start]


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
    ranges = [_unpack(packed, *ends) for ends in zip(edges[::2], edges[1::2], strict=False)]
    if (padding := ids.size - sum(map(len, ranges))) < 0:
        raise IndexError("more bits than token ids")
    return np.concatenate([*ranges, np.zeros(padding, np.uint8)]), int(ids.max(initial=-1))


def count_ones(packed: _Bytes, start: int, stop: int) -> int:
    """Return the number of ones among bits [start, stop)."""
    blocks = range(start, max(stop, start + 1), _BLOCK_TOKENS)
    return sum(int(_unpack(packed, at, min(at + _BLOCK_TOKENS, stop)).sum()) for at in blocks)
