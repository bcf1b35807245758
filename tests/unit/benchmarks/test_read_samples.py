"""The benchmark of reading samples compares what it claims to compare."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import read_samples
from benchmarks.common import write_corpus
from data_tools.corpus.opened import Corpus


def test_both_datasets_read_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    documents = ((np.arange(length), length % 3 == 0) for length in range(1, 40))
    prefix = write_corpus(tmp_path / "c", 300, documents)
    arguments = ["--data-path", str(prefix), "--vocab-size", "300", "--seq-length", "16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["read_samples.py", *arguments])
    seen = {}

    def look(datasets: dict, samples: int, rounds: int) -> dict[str, float]:
        seen.update(datasets)
        return {"GPTDataset": 1.0, "TaggedGPTDataset": 2.0}

    monkeypatch.setattr(read_samples, "samples_per_s", look)
    try:
        read_samples.main()
    finally:
        logging.disable(logging.NOTSET)
    plain, tagged = seen["GPTDataset"], seen["TaggedGPTDataset"]
    assert len(plain) == len(tagged) > 10
    for index in range(len(plain)):
        assert plain[index].keys() < tagged[index].keys()
        assert torch.equal(plain[index]["tokens"], tagged[index]["tokens"])
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert "2.00" in last_line and "0.9" in last_line and last_line.endswith("yes")


def test_random_corpora_have_the_requested_size_and_both_language_groups(tmp_path: Path) -> None:
    _, prefix, vocab_size = read_samples.random_corpus(tmp_path, 32_000, 100, tokens=20_000)
    corpus = Corpus(prefix)
    assert vocab_size == 32_000
    assert 20_000 <= len(corpus.tokens) <= 20_000 + corpus.document_lengths.max()
    assert 60 < corpus.document_lengths.mean() < 140
    assert 0.3 < corpus.is_original_document.mean() < 0.7
