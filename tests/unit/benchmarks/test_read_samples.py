"""The benchmark of reading samples compares what it claims to compare."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.common import write_corpus
from benchmarks.comparisons import read_samples
from data_tools.corpus.corpus import Corpus


def test_both_datasets_read_the_same_samples(tmp_path: Path, megatron: None) -> None:
    documents = ((np.arange(length), length % 3 == 0) for length in range(1, 40))
    prefix = write_corpus(tmp_path / "c", 300, documents)
    plain, tagged = read_samples.build_datasets(str(prefix), 300, 16, tmp_path / "cache").values()
    assert len(plain) == len(tagged) > 10
    for index in range(len(plain)):
        assert plain[index].keys() < tagged[index].keys()
        assert torch.equal(plain[index]["tokens"], tagged[index]["tokens"])


def test_random_corpora_have_the_requested_size_and_both_language_groups(tmp_path: Path) -> None:
    _, prefix, vocab_size = read_samples.random_corpus(tmp_path, 32_000, 100, tokens=20_000)
    corpus = Corpus(prefix)
    assert vocab_size == 32_000
    assert 20_000 <= len(corpus.tokens) <= 20_000 + corpus.document_lengths.max()
    assert 60 < corpus.document_lengths.mean() < 140
    assert 0.3 < corpus.is_original_document.mean() < 0.7
