"""Corpora joined: the bytes of one corpus written in one go, or one sentence and nothing written."""

from pathlib import Path

import numpy as np
import pytest

from data_tools import merge_data
from data_tools.corpus import CorpusPaths
from data_tools.corpus_writer import CorpusWriter
from moelpr.errors import UserError

Documents = list[tuple[list[int], bool]]


def write(prefix: Path, documents: Documents, vocab_size: int = 300) -> Path:
    with CorpusWriter(prefix, vocab_size) as writer:
        for ids, is_original in documents:
            writer.add_document(np.array(ids, np.int32), is_original)
        writer.finalize()
        writer.commit()
    return prefix


def merge(output: Path, *inputs: Path, flags: tuple[str, ...] = ()) -> None:
    merge_data.main(["--input", *map(str, inputs), "--output-prefix", str(output), *flags])


def content(prefix: Path) -> list[bytes]:
    return [path.read_bytes() for path in CorpusPaths.of(prefix)]


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_merged_corpora_are_the_bytes_of_one(vocab_size: int, tmp_path: Path) -> None:
    """Bits that begin anywhere in a byte, empty documents, and a part without any token."""
    random = np.random.default_rng(0)
    parts: list[Documents] = [
        [(random.integers(0, 300, random.integers(0, 30)).tolist(), bool(random.integers(2))) for _ in range(count)]
        for count in (5, 1, 13, 2)
    ]
    parts.insert(2, [([], True)])
    parts.insert(4, [])
    inputs = [write(tmp_path / f"part{index}", part, vocab_size) for index, part in enumerate(parts)]
    whole = write(tmp_path / "whole", [document for part in parts for document in part], vocab_size)
    merge(tmp_path / "merged", *inputs)
    assert content(tmp_path / "merged") == content(whole)


def test_what_cannot_be_merged_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    small, large = write(tmp_path / "small", [([1], True)]), write(tmp_path / "large", [([1], True)], 100_000)
    damaged, empty = write(tmp_path / "damaged", [([1, 2], True)]), write(tmp_path / "empty", [])
    lang = CorpusPaths.of(damaged).lang
    lang.write_bytes(lang.read_bytes()[:-1] + b"\x01")
    for inputs, said in [
        ((small, large), "large.bin holds int32, the corpora before it uint16; merge corpora of one tokenizer"),
        ((small, tmp_path / "gone"), "gone.bin and .*gone.idx are missing"),
        ((small, damaged), "damaged.lang is damaged"),
        ((empty,), "empty hold no tokens; nothing was written"),
    ]:
        with pytest.raises(UserError, match=said):
            merge(tmp_path / "out", *inputs)
    with pytest.raises(UserError, match="small.bin.* exists already"):
        merge(small, large)
    with pytest.raises(UserError, match="--output-prefix .*small is one of the inputs"):
        merge(small, small, flags=("--overwrite",))
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".*"))
