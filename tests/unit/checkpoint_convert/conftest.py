"""Tiny random models of every family, made by stock transformers."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random model of a transformers class, every tensor (biases and norms too) off its initial constant."""

    def make(
        architecture: str,
        dtype: torch.dtype = torch.float32,
        tokenizer: bool = False,
        save: dict | None = None,
        **changes,
    ) -> Path:
        import transformers

        torch.manual_seed(0)
        model_class = getattr(transformers, architecture)
        model = model_class(model_class.config_class(**(SHAPE | changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(architecture)
        model.to(dtype).save_pretrained(folder, **(save or {}))
        if tokenizer:
            save_tokenizer(folder, num_ids=60)
        return folder

    return make


@pytest.fixture(scope="session")
def make_qwen2(make_model: Callable[..., Path]) -> Callable[..., Path]:
    def make(dtype: torch.dtype = torch.float32, **options) -> Path:
        return make_model("Qwen2ForCausalLM", dtype, **options)

    return make


@pytest.fixture(scope="session")
def qwen2(make_qwen2: Callable[..., Path]) -> Path:
    """Untied, fp32, in several shards, with a tokenizer of 60 ids and a chat template. Tests must not change it."""
    return make_qwen2(tokenizer=True, save={"max_shard_size": "40KB"})


class HeldBytes:
    """Counts the bytes of tensors that were read and are still held."""

    def __init__(self) -> None:
        self._live: dict[int, int] = {}
        self._peak = 0

    def take_peak(self) -> int:
        """The most that was held at a time since the last call."""
        peak, self._peak = self._peak, 0
        return peak

    def watch(self, read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watched(*args):
            tensor = read(*args)
            storage = tensor.untyped_storage().data_ptr()
            self._live[storage] = tensor.untyped_storage().nbytes()
            weakref.finalize(tensor, self._live.pop, storage, None)
            self._peak = max(self._peak, sum(self._live.values()))
            return tensor

        return watched


@pytest.fixture
def held_bytes(monkeypatch) -> HeldBytes:
    """Of what is read from safetensors and from checkpoints."""
    from checkpoint_convert.hf_folder import HfReader
    from moelpr.torch_dist import TorchDistReader

    held = HeldBytes()
    monkeypatch.setattr(HfReader, "read", held.watch(HfReader.read))
    monkeypatch.setattr(TorchDistReader, "_load_chunk", held.watch(TorchDistReader._load_chunk))
    return held


@pytest.fixture
def write_tokenizer() -> Callable[..., None]:
    return save_tokenizer


def save_tokenizer(folder: Path, num_ids: int) -> None:
    """A byte-level BPE that knows the letters a, b and some runs of them."""
    from transformers import Qwen2Tokenizer

    words = ["a", "b"] + ["a" * n for n in range(2, num_ids - 1)]
    vocab = {"<|endoftext|>": 0} | {word: k for k, word in enumerate(words, start=1)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[("a", "a" * n) for n in range(1, num_ids - 2)])
    assert len(tokenizer) == num_ids
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
