"""Small corpora with manifests, as preprocess_data.py leaves them."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus_writer import CorpusWriter, Documents
from moelpr.data.manifest import LanguageCount, Manifest, Source, TokenizerRecord

ORIGINAL = {"en", "es", "zh"}
Document = tuple[str, list[int]]  # its language and its token ids


@pytest.fixture(scope="session")
def make_corpus_in() -> Callable[..., Path]:
    def make(
        folder: Path, name: str, documents: list[Document], vocab_size: int = 300, manifest: bool = True,
        **tokenizer: str,
    ) -> Path:  # fmt: skip
        counts: dict[str, LanguageCount] = {}
        per_language = defaultdict(list)
        with CorpusWriter(folder / name, vocab_size) as writer:
            for language, ids in documents:
                writer.add_document(np.array(ids, np.int32), language in ORIGINAL)
                per_language[language].append(len(ids))
            for language, lengths in per_language.items():
                bit = "original" if language in ORIGINAL else "expanded"
                counts[language] = LanguageCount(bit, len(lengths), sum(lengths), 4 * sum(lengths))
            files = writer.finalize()
            record = {"fingerprint": "f", "vocabulary_sha256": "v"} | tokenizer
            writer.commit(
                Manifest(
                    tokenizer=TokenizerRecord("HuggingFaceTokenizer", "hf", vocab_size, 0, True, **record),
                    append_eod=True,
                    sources=[Source(f"{name}.jsonl", 10, None, len(documents))],
                    languages=counts,
                    documents=len(documents),
                    tokens=writer.num_tokens,
                    skipped_lines=1,
                    files=files,
                )
                if manifest
                else None
            )
        return folder / name

    return make


@pytest.fixture
def make_corpus(tmp_path: Path, make_corpus_in: Callable[..., Path]) -> Callable[..., Path]:
    return partial(make_corpus_in, tmp_path)


@pytest.fixture
def mixed_corpus(make_corpus: Callable[..., Path], tmp_path: Path) -> Path:
    """One document whose bits change inside, and no manifest."""
    with CorpusWriter(tmp_path / "mixed", 300) as writer:
        writer.add(
            Documents(np.arange(7, dtype=np.uint16), np.array([7]), np.array([1, 0, 1], np.uint8), np.array([2, 4, 1]))
        )
        writer.finalize()
        writer.commit()
    return tmp_path / "mixed"
