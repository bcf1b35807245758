"""The C++ part of the .lang format against plain numpy code. Operations that numpy does as fast are not in C++.

Each operation runs in both versions, in one thread and on the same data, at a bit offset that is not a multiple of 8.
Sizes are those of a document, a training sample and a corpus shard.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import Times, Turns
from moelpr.data import _language_bits

Bits = NDArray[np.uint8]
DOCUMENT_TOKENS = 500
START = 1003  # bit offset
DEFAULTS = {"seconds": 0.3}  # per measurement, in all rounds together


def numpy_pack_into(packed: Bits, start: int, flags: Bits) -> None:
    """Prepend zeros up to the byte boundary, pack, and OR the shared first byte."""
    shift = start % 8
    shifted = np.zeros(shift + len(flags), np.uint8)
    shifted[shift:] = flags
    piece = np.packbits(shifted, bitorder="little")
    first = start // 8
    packed[first] |= piece[0]
    packed[first + 1 : first + len(piece)] = piece[1:]


def numpy_tag(packed: Bits, edges: list[int], ids: NDArray[np.int64]) -> tuple[Bits, int]:
    """Unpack the bytes around each range, and cut the ranges out of them."""
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


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    for tokens in (500, 4096, 8_388_608):
        for operation, versions in operations(tokens).items():
            times = turns.take(versions, lambda work: turns.seconds(work, settings.seconds / turns.rounds))
            yield f"{operation}, {tokens:,} tokens", times


def operations(tokens: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Operation -> version -> a call; both versions return the same."""
    rng = np.random.default_rng(1)
    flags = rng.integers(0, 2, tokens, dtype=np.uint8)
    stop = START + tokens
    packed, by_numpy = np.zeros((2, stop // 8 + 1), np.uint8)
    # Documents of a sample come from all over the corpus.
    ids = rng.integers(0, 152_000, tokens)
    lengths = np.diff([0, *range(DOCUMENT_TOKENS, tokens, DOCUMENT_TOKENS), tokens])
    starts = rng.integers(0, stop - lengths)
    edges = np.stack([starts, starts + lengths], axis=1).ravel().tolist()
    # Writing the same flags over themselves changes nothing, so every round does the same work.
    found: dict[str, dict[str, Callable[[], Any]]] = {
        name: {"numpy": partial(in_numpy, by_numpy, *arguments), "cpp": partial(in_cpp, packed, *arguments)}
        for name, in_numpy, in_cpp, *arguments in (
            ("append at a bit offset", numpy_pack_into, _language_bits.pack_into, START, flags),
            ("tag a sample's tokens", numpy_tag, _language_bits.tag, edges, ids),
            ("count in a range", numpy_count_ones, _language_bits.count_ones, START, stop),
        )
    }
    for versions in found.values():
        expected, actual = versions["numpy"](), versions["cpp"]()
        if expected is not None:
            np.testing.assert_equal(actual, expected)
    np.testing.assert_array_equal(packed, by_numpy)
    return found
