"""Is the C++ part of the .lang format worth having? Times it against the best plain numpy, in one process.

Each operation runs alternately in both ways, on the same data, at a bit offset that is not a multiple of 8; the
fastest of the rounds counts. Sizes are those of use: a document, a training sample, a corpus shard. What numpy does
as fast is not in C++.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moelpr.data import _language_bits

Bits = NDArray[np.uint8]
DOCUMENT_TOKENS = 500


def numpy_pack_into(packed: Bits, start: int, flags: Bits) -> None:
    """Shift by prepending the zeros up to the byte border, pack, and OR the shared first byte."""
    shift = start % 8
    shifted = np.zeros(shift + len(flags), np.uint8)
    shifted[shift:] = flags
    piece = np.packbits(shifted, bitorder="little")
    first = start // 8
    packed[first] |= piece[0]
    packed[first + 1 : first + len(piece)] = piece[1:]


def numpy_tag(packed: Bits, edges: list[int], ids: NDArray[np.int64]) -> tuple[Bits, int]:
    """Unpack the bytes around each range into one array, and cut the ranges out of it."""
    bits, done = np.zeros(len(ids), np.uint8), 0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        first = start // 8
        flags = np.unpackbits(packed[first : (stop + 7) // 8], bitorder="little")
        bits[done : done + stop - start] = flags[start - 8 * first : stop - 8 * first]
        done += stop - start
    return bits, int(ids.max())


def numpy_count_ones(packed: Bits, start: int, stop: int) -> int:
    first, last = start // 8, (stop - 1) // 8
    head, tail = 0xFF << start % 8 & 0xFF, 0xFF >> 7 - (stop - 1) % 8
    if first == last:
        return (int(packed[first]) & head & tail).bit_count()
    ends = (int(packed[first]) & head).bit_count() + (int(packed[last]) & tail).bit_count()
    return ends + int(np.bitwise_count(packed[first + 1 : last]).sum())


def fastest_s(ways: list[Callable[[], object]], seconds: float) -> list[float]:
    """The fastest time of each way, in seconds per call; the ways take turns so that both see the same machine."""
    calls = []
    for way in ways:
        way()
        started = time.perf_counter()
        way()
        calls.append(max(1, int(seconds / 20 / max(time.perf_counter() - started, 1e-7))))
    best = [float("inf")] * len(ways)
    for _ in range(10):
        for index, way in enumerate(ways):
            started = time.perf_counter()
            for _ in range(calls[index]):
                way()
            best[index] = min(best[index], (time.perf_counter() - started) / calls[index])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="time per measurement, in seconds (default: 0.3)")
    arguments = parser.parse_args()

    rng = np.random.default_rng(1)
    start = 1003
    print(f"{'operation':<34}{'tokens':>11}{'numpy':>13}{'C++':>13}{'ratio':>9}   tokens/s (C++)")
    for tokens in (500, 4096, 8_388_608):
        flags = rng.integers(0, 2, tokens, dtype=np.uint8)
        stop = start + tokens
        zeros = np.zeros(stop // 8 + 1, np.uint8)
        by_numpy, by_cpp = zeros.copy(), zeros.copy()
        numpy_pack_into(by_numpy, start, flags)
        _language_bits.pack_into(by_cpp, start, flags)
        np.testing.assert_array_equal(by_numpy, by_cpp)
        packed = by_cpp
        # A sample whose documents come from all over the corpus.
        ids = rng.integers(0, 152_000, tokens)
        lengths = np.diff([0, *range(DOCUMENT_TOKENS, tokens, DOCUMENT_TOKENS), tokens])
        places = rng.integers(0, stop - lengths)
        edges = np.stack([places, places + lengths], axis=1).ravel().tolist()
        for found, wanted in zip(_language_bits.tag(packed, edges, ids), numpy_tag(packed, edges, ids), strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert numpy_count_ones(packed, start, stop) == _language_bits.count_ones(packed, start, stop) == flags.sum()

        # Writing the same flags over themselves changes nothing, so every round does the same work.
        rows: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            (
                "append at a bit offset",
                partial(numpy_pack_into, by_numpy, start, flags),
                partial(_language_bits.pack_into, by_cpp, start, flags),
            ),
            (
                "tag a sample's tokens",
                partial(numpy_tag, packed, edges, ids),
                partial(_language_bits.tag, packed, edges, ids),
            ),
            (
                "count in a range",
                partial(numpy_count_ones, packed, start, stop),
                partial(_language_bits.count_ones, packed, start, stop),
            ),
        ]
        for name, numpy_way, cpp_way in rows:
            numpy_s, cpp_s = fastest_s([numpy_way, cpp_way], arguments.seconds)
            print(
                f"{name:<34}{tokens:>11,}{1e6 * numpy_s:>10.2f} µs{1e6 * cpp_s:>10.2f} µs{numpy_s / cpp_s:>8.1f}x"
                f"{tokens / cpp_s:>17.2e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
