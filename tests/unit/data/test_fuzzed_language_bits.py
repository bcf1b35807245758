"""Mutated .lang files and invalid arguments end in an error, never in a crash, and every change is noticed.

tests/unit/data/test_sanitizers.py runs this with the C++ part under sanitizers.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.data import _language_bits
from moelpr.data.language_bits import LanguageBits, LanguageBitsWriter
from moelpr.errors import UserError

INT64 = st.one_of(st.integers(-20, 200), st.integers(-(2**63), 2**63 - 1))
BYTES = st.binary(max_size=24).map(lambda content: np.frombuffer(bytearray(content), np.uint8))
FLAGS = st.lists(st.integers(0, 3), max_size=40).map(lambda flags: np.array(flags, np.uint8))


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a few bytes changed, cut out, put in, or doubled; it may be the same again."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        stop = draw(st.integers(start, min(len(changed), start + 16)))
        way = draw(st.sampled_from(["flip", "overwrite", "cut", "cut to the end", "double"]))
        if way == "flip" and start < len(changed):
            changed[start] ^= 1 << draw(st.integers(0, 7))
        elif way == "overwrite":
            changed[start:stop] = draw(st.binary(max_size=16))
        elif way == "cut":
            del changed[start:stop]
        elif way == "cut to the end":
            del changed[start:]
        elif way == "double":
            changed[start:start] = changed[start:stop]
    return bytes(changed)


@pytest.fixture(scope="module")
def lang(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "a.lang"
    with LanguageBitsWriter(path) as writer:
        writer.append(np.random.default_rng(0).integers(0, 2, 1003, dtype=np.uint8))
        writer.finalize()
    return path, path.read_bytes()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_mutated_file_is_noticed_or_is_the_same(lang: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = lang
    changed = data.draw(mutated(content))
    path.write_bytes(changed)
    try:
        bits = LanguageBits(path)
    except UserError:
        assert changed != content
        return
    # Opening does not read the payload; whatever it holds, every range can be read.
    start = data.draw(st.integers(0, bits.num_tokens))
    stop = data.draw(st.integers(start, bits.num_tokens))
    piece = bits.slice(start, stop)
    assert len(piece) == stop - start and piece.sum() == bits.count(start, stop)
    ids = np.arange(stop - start)
    tagged, largest = bits.of_sample([start, stop], ids)
    np.testing.assert_array_equal(tagged, piece)
    assert largest == stop - start - 1
    if changed == content:
        bits.verify()
    else:
        with pytest.raises(UserError):
            bits.verify()


@settings(deadline=None, max_examples=200)
@given(packed=BYTES, start=INT64, flags=FLAGS)
def test_packing_stays_inside_its_bytes(packed: np.ndarray, start: int, flags: np.ndarray) -> None:
    before = packed.copy()
    bits = np.unpackbits(packed, bitorder="little")
    try:
        ones = _language_bits.pack_into(packed, start, flags)
    except (IndexError, ValueError):
        assert not 0 <= start <= len(bits) - len(flags) or flags.max(initial=0) > 1
        return
    assert 0 <= start and start + len(flags) <= len(bits) and ones == flags.sum()
    changed = np.unpackbits(packed ^ before, bitorder="little")
    assert not changed[:start].any() and not changed[-(-(start + len(flags)) // 8) * 8 :].any()


@settings(deadline=None, max_examples=200)
@given(packed=BYTES, start=INT64, stop=INT64)
def test_ranges_are_counted_inside_their_bytes(packed: np.ndarray, start: int, stop: int) -> None:
    bits = np.unpackbits(packed, bitorder="little")
    if 0 <= start <= stop <= len(bits):
        assert _language_bits.count_ones(packed, start, stop) == bits[start:stop].sum()
    else:
        with pytest.raises(IndexError):
            _language_bits.count_ones(packed, start, stop)


@settings(deadline=None, max_examples=200)
@given(packed=BYTES, edges=st.lists(INT64, max_size=9), size=st.integers(0, 60))
def test_a_sample_is_read_from_inside_its_bytes(packed: np.ndarray, edges: list[int], size: int) -> None:
    bits = np.unpackbits(packed, bitorder="little")
    ids = np.arange(size) - 1
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    fit = all(0 <= start <= stop <= len(bits) for start, stop in ranges)
    if not fit or sum(stop - start for start, stop in ranges) > size:
        with pytest.raises(IndexError):
            _language_bits.tag(packed, edges, ids)
        return
    found, largest = _language_bits.tag(packed, edges, ids)
    wanted = np.concatenate([np.zeros(0, np.uint8), *(bits[start:stop] for start, stop in ranges)])
    np.testing.assert_array_equal(found, np.pad(wanted, (0, size - len(wanted))))
    assert largest == max(ids, default=-1)


@pytest.mark.parametrize("wrong", [np.zeros(9, np.int8), np.zeros(18, np.uint8)[::2], [0] * 9, None, "012345678"])
def test_wrong_arrays_are_rejected_not_copied(wrong: object) -> None:
    right = np.zeros(9, np.uint8)
    for call in (
        lambda: _language_bits.pack_into(wrong, 0, right),
        lambda: _language_bits.pack_into(right, 0, wrong),
        lambda: _language_bits.count_ones(wrong, 0, 1),
        lambda: _language_bits.tag(wrong, [0, 1], np.zeros(9, np.int64)),
        lambda: _language_bits.tag(right, [0, 1], np.zeros(9, np.int32)),
    ):
        with pytest.raises(TypeError):
            call()
    read_only = np.zeros(9, np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError):
        _language_bits.pack_into(read_only, 0, right)
