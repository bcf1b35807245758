"""Corpora of random documents, with what they contain known, and small tokenizers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common
from tests.support.small_tokenizers import save_fast


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray, np.ndarray]]:
    """Write <name>.bin/.idx/.lang; returns the prefix, all tokens and all language bits."""

    def write(name: str, documents: int = 40, vocab: int = 500, bits: str = "random", seed: int = 0):  # noqa: ANN202
        rng, made = np.random.default_rng(seed), []
        for _ in range(documents):
            ids = rng.integers(0, vocab, int(rng.integers(3, 60)))
            made.append((ids, {"random": bool(rng.integers(2)), "original": True, "expanded": False}[bits]))
        is_original = [np.full(len(ids), bit) for ids, bit in made]
        prefix = common.write_corpus(tmp_path / name, vocab, made)
        return prefix, np.concatenate([ids for ids, _ in made]), np.concatenate(is_original)

    return write


save_hf = pytest.fixture(lambda: save_fast, name="save_hf")
