"""The benchmarks of reading run, and compare what they say they compare."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.corpus_writer import CorpusWriter


def test_both_datasets_read_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from benchmarks import read_samples

    with CorpusWriter(tmp_path / "c", 300) as writer:
        for length in range(1, 40):
            writer.add_document(np.arange(length), length % 3 == 0)
        writer.finalize()
        writer.commit()
    words = ["--data-path", str(tmp_path / "c"), "--vocab-size", "300", "--seq-length", "16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["read_samples.py", *words])
    seen = []

    def look(datasets: list, samples: int, rounds: int) -> list[float]:
        seen.extend(datasets)
        return [2.0, 1.0]

    monkeypatch.setattr(read_samples, "fastest_s", look)
    try:
        read_samples.main()
    finally:
        logging.disable(logging.NOTSET)
    plain, tagged = seen
    assert len(plain) == len(tagged) > 10
    for index in range(len(plain)):
        assert plain[index].keys() < tagged[index].keys()
        assert torch.equal(plain[index]["tokens"], tagged[index]["tokens"])
    assert capsys.readouterr().out.endswith("lowest ratio 2.00, wanted at least 0.9: yes\n")


def test_positions_count_from_each_documents_first_token() -> None:
    from benchmarks.packed_attention import random_positions

    positions = random_positions(3, 200, 10)
    assert (positions[:, 0] == 0).all()
    steps = positions.diff(dim=1)
    assert ((steps == 1) | (positions[:, 1:] == 0)).all()
    assert 30 < (positions == 0).sum() < 90
