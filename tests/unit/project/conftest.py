"""A project whose base is a shape and a tokenizer, and whose text is a few lines: enough to plan, not to train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moelpr.base.yaml_files import dump
from tests.support.hf_models import make_model, make_qwen2, qwen2  # noqa: F401

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a languages.yaml in an empty current folder, whose keys the arguments replace (None removes one)."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(QWEN2))
    for code in ("el", "hu", "en", "es"):
        (tmp_path / f"{code}.jsonl").write_text(100 * (json.dumps({"text": f"{code} text " * 20}) + "\n"))

    def write(**changes: Any) -> Path:
        content = {
            "model": "base",
            "output": "out",
            "languages": {"expanded": {"el": "el.jsonl", "hu": "hu.jsonl"}, "original": {"en": "en.jsonl"}},
            "budget": {"epochs": 1},
            "experts": {"new": 2},
        }
        path = tmp_path / "languages.yaml"
        path.write_text(dump({key: value for key, value in (content | changes).items() if value is not None}))
        return path

    return write
