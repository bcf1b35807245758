"""Corpora of random documents, with what they contain known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray, np.ndarray]]:
    """Write <name>.bin/.idx/.lang; returns the prefix, all tokens and all language bits."""

    def write(name: str, documents: int = 40, vocab: int = 500, bits: str = "random", seed: int = 0):  # noqa: ANN202
        from data_tools.corpus_writer import CorpusWriter

        rng = np.random.default_rng(seed)
        tokens, is_original = [], []
        with CorpusWriter(tmp_path / name, vocab_size=vocab) as writer:
            for _ in range(documents):
                ids = rng.integers(0, vocab, int(rng.integers(3, 60)))
                bit = {"random": bool(rng.integers(2)), "original": True, "expanded": False}[bits]
                writer.add_document(ids, bit)
                tokens.append(ids)
                is_original.append(np.full(len(ids), bit))
            writer.finalize()
            writer.commit()
        return tmp_path / name, np.concatenate(tokens), np.concatenate(is_original)

    return write
