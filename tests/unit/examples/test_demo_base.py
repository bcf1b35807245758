"""The demo's tokenizer, trained on a few made-up sentences, and the model that is saved with it."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from examples.demo_base import SHAPE, make_base
from tests.support.hf_models import files_of, load_stock

TEXTS = [
    "The device can't be reached. Check 2 addresses and try again.",
    "Δεν είναι δυνατή η σύνδεση με τη συσκευή.",
    "Az eszköz nem érhető el, próbálja újra később.",
    "无法连接到设备，请检查网络。",
]


def test_a_tokenizer_round_trips_text_and_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    for name in ("one", "two"):
        make_base([corpus], tmp_path / name, 320)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == 320
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.encode("a<|endoftext|>")[-1] == tokenizer.eos_token_id
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]  # as Qwen2 does
    for text in [*TEXTS, "never seen: žluťoučký 🦊\n\ttab"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    config = load_stock(tmp_path / "one", "Qwen2ForCausalLM").config
    assert config.vocab_size == 320 and SHAPE.items() <= config.to_dict().items()
