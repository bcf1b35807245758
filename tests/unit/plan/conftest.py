"""Small models as config.json folders and as specs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(**changes: object) -> Path:
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        return folder

    return write
