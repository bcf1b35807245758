"""The .lang format round-trips at any bit offset; damage is noticed; invalid arguments never crash.

test_sanitizers.py runs this file with the C++ part under sanitizers.
"""

import struct
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.base.errors import UserError
from moelpr.data import _language_bits, language_bits, language_bits_numpy
from moelpr.data.language_bits import LanguageBits, LanguageBitsWriter, open_bits
from tests.support.mutations import mutated

# Every example writes files: no deadline, the disk may be busy.
bit_arrays = st.lists(st.integers(0, 1), max_size=70).map(lambda bits: np.array(bits, np.uint8))

INT64 = st.one_of(st.integers(-20, 200), st.integers(-(2**63), 2**63 - 1))
BYTES = st.binary(max_size=24).map(lambda content: np.frombuffer(bytearray(content), np.uint8))
FLAGS = st.lists(st.integers(0, 3), max_size=40).map(lambda flags: np.array(flags, np.uint8))


def write(path: Path, *pieces: np.ndarray) -> Path:
    with LanguageBitsWriter(path) as writer:
        for piece in pieces:
            writer.append(piece)
        writer.finalize()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of a property test's examples."""
    return tmp_path_factory.mktemp("lang")


@settings(deadline=None)
@given(
    pieces=st.lists(bit_arrays | st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=4), max_size=8),
    buffer_bytes=st.integers(1, 9) | st.just(1 << 10),
    run_tokens=st.sampled_from([7, 1 << 10]),
)
def test_bits_and_runs_in_any_pieces_are_written_as_numpy_packs_them(folder, pieces, buffer_bytes, run_tokens) -> None:
    """Also pieces that cross the buffer, and runs that are longer than what is written at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_bits, "_BUFFER_TOKENS", 8 * buffer_bytes)
        patch.setattr(language_bits, "_RUN_TOKENS", run_tokens)
        with LanguageBitsWriter(folder / "pieces.lang") as writer:
            for piece in pieces:
                if isinstance(piece, list):
                    writer.append_runs(np.array([length << 1 | bit for bit, length in piece], np.int64))
                else:
                    writer.append(piece)
            writer.finalize()
    bits = [
        np.repeat(*np.array(piece, np.uint8).reshape(-1, 2).T) if isinstance(piece, list) else piece for piece in pieces
    ]
    whole = np.concatenate([np.zeros(0, np.uint8), *bits])
    content = (folder / "pieces.lang").read_bytes()
    assert content == write(folder / "once.lang", whole).read_bytes()
    assert content[language_bits.HEADER_BYTES :] == np.packbits(whole, bitorder="little").tobytes()
    read = LanguageBits(folder / "pieces.lang")
    read.verify()
    assert (read.num_tokens, read.num_original) == (len(whole), whole.sum())


@settings(deadline=None)
@given(bits=bit_arrays, data=st.data())
def test_slices_and_counts_equal_numpy(folder: Path, bits: np.ndarray, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(bits)))
    stop = data.draw(st.integers(start, len(bits)))
    read = LanguageBits(write(folder / "slices.lang", bits))
    piece = read.slice(start, stop)
    assert piece.dtype == np.uint8
    np.testing.assert_array_equal(piece, bits[start:stop])
    assert read.count(start, stop) == bits[start:stop].sum()
    positions = np.array(data.draw(st.lists(st.integers(0, len(bits) - 1))) if len(bits) else [], np.int64)
    np.testing.assert_array_equal(read.at(positions), bits[positions])


def test_bool_and_strided_bits_are_accepted(tmp_path: Path) -> None:
    bits = np.array([1, 0, 0, 1, 1, 0, 1, 0, 1, 1], np.uint8)
    expected = write(tmp_path / "a.lang", bits[::2]).read_bytes()
    assert write(tmp_path / "b.lang", bits.astype(bool)[::2]).read_bytes() == expected


def test_rejected_append_does_not_change_the_writer(tmp_path: Path) -> None:
    first, second = np.array([1, 0, 1], np.uint8), np.array([0, 1, 0, 0, 0], np.uint8)
    with LanguageBitsWriter(tmp_path / "a.lang") as writer:
        writer.append(first)
        with pytest.raises(ValueError, match="int64"):
            writer.append(np.array([0, 1]))
        for position in range(20):
            wrong = np.ones(20, np.uint8)
            wrong[position] = 2 + position
            with pytest.raises(ValueError, match="0 or 1"):
                writer.append(wrong)
        writer.append(second)
        writer.finalize()
    assert (tmp_path / "a.lang").read_bytes() == write(tmp_path / "b.lang", first, second).read_bytes()


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 11), (11, 11)])
def test_range_outside_the_file_is_rejected(tmp_path: Path, start: int, stop: int) -> None:
    bits = LanguageBits(write(tmp_path / "a.lang", np.ones(10, np.uint8)))
    outside = np.array([0, 10 if start >= 0 else -1])
    for read, where in ((bits.slice, (start, stop)), (bits.count, (start, stop)), (bits.at, (outside,))):
        with pytest.raises(IndexError):
            read(*where)


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.lang", np.array([1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0], np.uint8))
    content = path.read_bytes()
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged\.lang"):
            LanguageBits(path).verify()


def test_truncated_long_foreign_and_unfinished_files_are_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lang", np.ones(100, np.uint8))
    content = path.read_bytes()

    with LanguageBitsWriter(path) as writer:
        writer.append(np.ones(100, np.uint8))
    for changed, message in (
        (path.read_bytes(), "not a complete .lang file"),
        (content[:-1], "contains 76 bytes, not 77 for 100 tokens"),
        (content + b"\0", "contains 78 bytes"),
        (content[:20], "not a complete .lang file"),
        (b"", "not a complete .lang file"),
        (b"MMIDIDX\0" + content[8:], "it starts with b'MMIDIDX"),
        (content[:8] + struct.pack("<I", 2) + content[12:], "version 2 of the .lang format"),
    ):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=message):
            LanguageBits(path)
    with pytest.raises(UserError, match=r"can't be opened"):
        LanguageBits(tmp_path)


def test_padding_and_count_are_verified_too(tmp_path: Path) -> None:
    """A faulty writer could store a matching checksum, so padding and count are verified separately."""

    def with_header(payload: bytes, num_original: int) -> LanguageBits:
        header = language_bits._header(zlib.crc32(payload), 4, num_original)
        (tmp_path / "wrong.lang").write_bytes(header + payload)
        return LanguageBits(tmp_path / "wrong.lang")

    with_header(b"\x0f", 4).verify()
    with pytest.raises(UserError, match="bits are set after its last token"):
        with_header(b"\x1f", 4).verify()
    with pytest.raises(UserError, match="4 original-language tokens, not 3"):
        with_header(b"\x0f", 3).verify()


def test_lang_file_that_does_not_cover_its_bin_is_rejected(tmp_path: Path) -> None:
    write(tmp_path / "zh.lang", np.ones(4095, np.uint8))
    assert open_bits(tmp_path / "zh", 4095)[0].num_original == 4095
    with pytest.raises(UserError, match=r"zh\.lang covers 4,095 tokens, .*zh\.bin contains 4,096"):
        open_bits(str(tmp_path / "zh"), 4096)
    with pytest.raises(UserError, match=r"es\.lang .*No such file"):
        open_bits(tmp_path / "es", 4096)


@pytest.fixture(scope="module")
def lang(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    bits = np.random.default_rng(0).integers(0, 2, 1003, dtype=np.uint8)
    path = write(tmp_path_factory.mktemp("fuzz") / "a.lang", bits)
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


BOTH = pytest.mark.parametrize("bits_of", [_language_bits, language_bits_numpy], ids=["compiled", "NumPy"])


@BOTH
@settings(deadline=None, max_examples=200)
@given(packed=BYTES, start=INT64, flags=FLAGS)
def test_packing_stays_inside_its_bytes(bits_of: ModuleType, packed: np.ndarray, start: int, flags: np.ndarray) -> None:
    before = packed.copy()
    bits = np.unpackbits(packed, bitorder="little")
    try:
        ones = bits_of.pack_into(packed, start, flags)
    except (IndexError, ValueError):
        assert not 0 <= start <= len(bits) - len(flags) or flags.max(initial=0) > 1
        return
    assert 0 <= start and start + len(flags) <= len(bits) and ones == flags.sum()
    changed = np.unpackbits(packed ^ before, bitorder="little")
    assert not changed[:start].any() and not changed[-(-(start + len(flags)) // 8) * 8 :].any()


@BOTH
@settings(deadline=None, max_examples=200)
@given(packed=BYTES, start=INT64, stop=INT64)
def test_ranges_are_counted_inside_their_bytes(bits_of: ModuleType, packed: np.ndarray, start: int, stop: int) -> None:
    bits = np.unpackbits(packed, bitorder="little")
    if 0 <= start <= stop <= len(bits):
        assert bits_of.count_ones(packed, start, stop) == bits[start:stop].sum()
    else:
        with pytest.raises(IndexError):
            bits_of.count_ones(packed, start, stop)


@BOTH
@settings(deadline=None, max_examples=200)
@given(packed=BYTES, edges=st.lists(INT64, max_size=9), size=st.integers(0, 60))
def test_a_sample_is_read_from_inside_its_bytes(bits_of: ModuleType, packed, edges: list[int], size: int) -> None:
    bits = np.unpackbits(packed, bitorder="little")
    ids = np.arange(size) - 1
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    fit = all(0 <= start <= stop <= len(bits) for start, stop in ranges)
    if not fit or sum(stop - start for start, stop in ranges) > size:
        with pytest.raises(IndexError):
            bits_of.tag(packed, edges, ids)
        return
    actual, largest = bits_of.tag(packed, edges, ids)
    wanted = np.concatenate([np.zeros(0, np.uint8), *(bits[start:stop] for start, stop in ranges)])
    np.testing.assert_array_equal(actual, np.pad(wanted, (0, size - len(wanted))))
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
