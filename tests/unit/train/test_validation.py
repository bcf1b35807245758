"""Bits per byte of held-out text, and the number of bytes per token they are computed with."""

import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.common import write_corpus
from moelpr.base.errors import UserError
from moelpr.data.manifest import LanguageCount, Manifest, TokenizerRecord
from moelpr.train.validation import HeldOut, bytes_per_token, result
from tests.support.small_tokenizers import save_llama3

TEXTS = ["Η πόρτα είναι ανοιχτή.", "門は開いている。", "The door is open."]


def test_a_loss_becomes_bits_per_byte_or_bits_per_token_if_bytes_are_unknown() -> None:
    known, unknown = (HeldOut("el", "expanded", None, 2, bytes_per_token) for bytes_per_token in (2.5, None))
    found = result(known, loss=3.0)
    assert found == {"group": "expanded", "lm_loss": 3.0, "bits_per_byte": pytest.approx(3.0 / math.log(2) / 2.5)}
    assert result(unknown, loss=3.0)["bits_per_token"] == pytest.approx(3.0 / math.log(2))
    assert result(known, loss=math.nan) == {"group": "expanded", "lm_loss": None, "bits_per_byte": None}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint folder with a byte-level tokenizer."""
    (tmp_path / "model").mkdir()
    save_llama3(tmp_path / "model" / "hf")
    return tmp_path / "model"


@pytest.fixture
def corpus(tmp_path: Path, model: Path) -> tuple[str, int]:
    """A prefix and its number of tokens, ends of documents included."""
    tokenizer = Tokenizer.from_file(str(model / "hf" / "tokenizer.json"))
    documents = [[*tokenizer.encode(text).ids, tokenizer.token_to_id("<|end_of_text|>")] for text in TEXTS]
    prefix = write_corpus(tmp_path / "corpus", 600, ((document, True) for document in documents))
    return str(prefix), sum(map(len, documents))


def test_bytes_are_counted_by_decoding(model: Path, corpus: tuple[str, int]) -> None:
    prefix, num_tokens = corpus
    assert bytes_per_token(prefix, model) == sum(len(text.encode()) for text in TEXTS) / num_tokens


def test_the_manifest_is_preferred_and_nothing_is_guessed(tmp_path: Path, model: Path, corpus: tuple[str, int]) -> None:
    prefix, _ = corpus
    assert bytes_per_token(prefix, tmp_path) is None  # no tokenizer
    languages = {"el": LanguageCount("expanded", 1, 6, 30), "en": LanguageCount("original", 1, 4, 12)}
    tokenizer = TokenizerRecord("HuggingFaceTokenizer", "there", 300, 0, True, "", "")
    Manifest(tokenizer, True, [], languages, documents=2, tokens=10, skipped_lines=0, files={}).write(prefix)
    assert bytes_per_token(prefix, model) == 4.2
    Path(f"{prefix}.manifest.json").write_text('{"tokens": 10}')
    with pytest.raises(UserError, match="manifest.json: .* is missing"):
        bytes_per_token(prefix, model)
