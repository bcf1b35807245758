"""Megatron's .idx is rejected unless it agrees with itself and with its .bin."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moelpr.base.errors import UserError
from moelpr.data import corpus_index
from moelpr.data.corpus_index import CorpusIndex


def write(prefix: Path, lengths: list[int], pointers: list[int], starts: list[int], code: int = 8, tokens: int = 9):  # noqa: ANN201
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(starts))
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(starts, "<i8"))
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    Path(f"{prefix}.bin").write_bytes(bytes(2 * tokens))


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_index_equals_megatrons_reader(write_corpus: Callable, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    monkeypatch.setattr(corpus_index, "_AT_ONCE", at_once)
    prefix, tokens, _ = write_corpus("corpus")
    ours, megatrons = CorpusIndex.open(prefix), IndexedDataset(str(prefix))
    assert ours.dtype == megatrons.index.dtype and ours.num_tokens == len(tokens)
    assert np.array_equal(ours.sequence_lengths, megatrons.sequence_lengths)
    assert np.array_equal(ours.document_starts, megatrons.document_indices)


def test_inconsistent_numbers_are_rejected(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    write(prefix, [4, 5], [0, 8], [0, 1, 2])
    assert CorpusIndex.open(prefix).num_tokens == 9
    for lengths, pointers, starts in [
        ([4, 5], [0, 10], [0, 1, 2]),  # a gap
        ([4, 5], [0, 6], [0, 1, 2]),  # an overlap
        ([10, -1], [0, 20], [0, 1, 2]),  # the sum is right
        ([4, 5], [0, 8], [1, 1, 2]),
        ([4, 5], [0, 8], [0, 1, 1]),
        ([4, 5], [0, 8], [0, 3, 2]),
        ([4, 5], [0, 8], []),
    ]:
        write(prefix, lengths, pointers, starts)
        with pytest.raises(UserError, match=r"a\.idx is (not a complete Megatron \.idx file|damaged)"):
            CorpusIndex.open(prefix)
    write(prefix, [4, 5], [0, 8], [0, 1, 2], tokens=8)
    with pytest.raises(UserError, match=r"a\.bin contains 16 bytes, .*a\.idx describes 18 \(9 tokens of 2 bytes\)"):
        CorpusIndex.open(prefix)
    write(prefix, [4, 5], [0, 8], [0, 1, 2], code=6)  # a float
    with pytest.raises(UserError, match="not a complete Megatron"):
        CorpusIndex.open(prefix)


def test_unreadable_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the error is simulated."""
    write(tmp_path / "a", [4, 5], [0, 8], [0, 1, 2])

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for owner, name, file in ((np, "memmap", "idx"), (Path, "open", "bin")):
        with monkeypatch.context() as context:
            context.setattr(owner, name, refuse)
            with pytest.raises(UserError, match=rf"a\.{file} .*Permission denied"):
                CorpusIndex.open(tmp_path / "a")
