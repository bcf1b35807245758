"""The demo's tokenizer, trained on a few made-up sentences."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples.demo_tokenizer import train_demo_tokenizer
from moelpr.base.errors import UserError
from tests.support.hf_models import files_of

TEXTS = [
    "The device can't be reached. Check 2 addresses and try again.",
    "Δεν είναι δυνατή η σύνδεση με τη συσκευή.",
    "Az eszköz nem érhető el, próbálja újra később.",
    "无法连接到设备，请检查网络。",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_tokenizer_loads_with_transformers_and_round_trips_text(corpus: Path, tmp_path: Path) -> None:
    train_demo_tokenizer([corpus], tmp_path / "tokenizer", 300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.encode("a<|endoftext|>")[-1] == tokenizer.eos_token_id
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]  # as Qwen2 does
    for text in [*TEXTS, "never seen: žluťoučký 🦊\n\ttab"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_texts_give_the_same_files(corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_demo_tokenizer([corpus], tmp_path / name, 320)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    with pytest.raises(UserError, match="--overwrite"):
        train_demo_tokenizer([corpus], tmp_path / "one", 320)


def test_too_little_text_for_the_vocabulary_is_rejected(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vocab-size is 9,000"):
        train_demo_tokenizer([corpus], tmp_path / "tokenizer", 9000)
    with pytest.raises(UserError, match="--vocab-size must be at least 257"):
        train_demo_tokenizer([corpus], tmp_path / "tokenizer", 200)
    assert not (tmp_path / "tokenizer").exists()
