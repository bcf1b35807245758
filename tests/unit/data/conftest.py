"""Corpora of random documents, with what they contain known, and small tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray, np.ndarray]]:
    """Write <name>.bin/.idx/.lang; returns the prefix, all tokens and all language bits."""

    def write(name: str, documents: int = 40, vocab: int = 500, bits: str = "random", seed: int = 0):  # noqa: ANN202
        from data_tools.corpus.corpus_writer import CorpusWriter

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


def _save_hf(folder: Path, tokenizer: Tokenizer, kind: str = "PreTrainedTokenizerFast", **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": kind, "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


save_hf = pytest.fixture(lambda: _save_hf, name="save_hf")
