"""The benchmark of reading samples compares what it claims to compare."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.common import write_corpus
from benchmarks.comparisons import read_samples


def test_both_datasets_read_the_same_samples(tmp_path: Path, megatron: None) -> None:
    documents = ((np.arange(length), length % 3 == 0) for length in range(1, 40))
    prefix = write_corpus(tmp_path / "c", 300, documents)
    plain, tagged = read_samples.build_datasets(str(prefix), 300, 16, tmp_path / "cache").values()
    assert len(plain) == len(tagged) > 10
    for index in range(len(plain)):
        assert plain[index].keys() < tagged[index].keys()
        assert torch.equal(plain[index]["tokens"], tagged[index]["tokens"])
