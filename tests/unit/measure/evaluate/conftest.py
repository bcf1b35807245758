"""Tiny models with random weights, a byte-level tokenizer, held-out text in files, and the command."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moelpr.base.errors import UserError
from moelpr.measure.evaluate.models import read_max_positions
from moelpr.measure.evaluate.scoring import LanguageScore, Settings, score_each
from tests.support.commands import moelpr
from tests.support.small_tokenizers import byte_level_bpe

ENGLISH = "Turn the light on when somebody comes home late, and off again in the morning."
TEXTS = {
    "en": ["The door is open.", ENGLISH, "Yes"],
    "el": ["Η πόρτα είναι ανοιχτή.", "Άναψε το φως όταν κάποιος γυρίζει αργά στο σπίτι και σβήσε το το πρωί."],
    "zh": ["门是开着的。", "有人晚回家时开灯,早上再关掉。😀"],
}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = byte_level_bpe([text for group in TEXTS.values() for text in group], special=["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory, tokenizer) -> Path:
    """A stock Qwen2 directory."""
    return save(Qwen2ForCausalLM, Qwen2Config(vocab_size=len(tokenizer), **SHAPE), tokenizer, tmp_path_factory, "dense")


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory, tokenizer) -> Path:
    """A stock Qwen2Moe directory as the exporter writes it: no shared expert, layer 1 is dense."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    experts |= {"shared_expert_intermediate_size": 0, "mlp_only_layers": [1]}
    config = Qwen2MoeConfig(vocab_size=len(tokenizer), **experts, **SHAPE)
    return save(Qwen2MoeForCausalLM, config, tokenizer, tmp_path_factory, "moe")


def save(model_class, config, tokenizer, tmp_path_factory, name: str) -> Path:
    torch.manual_seed(7)
    model = model_class(config)
    with torch.no_grad():  # transformers initializes routers to zero
        for parameter in model.parameters():
            if parameter.numel():
                parameter.normal_(std=0.3)
    directory = tmp_path_factory.mktemp(name) / name
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def data(tmp_path, texts) -> list[str]:
    """The --data arguments of TEXTS in files."""
    for language, documents in texts.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        (tmp_path / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [argument for language in texts for argument in ("--data", f"{language}={tmp_path}/{language}.jsonl")]


@pytest.fixture
def score() -> Callable[..., dict[str, LanguageScore]]:
    """Score a loaded model on texts, in windows that it supports."""

    def run(loaded, documents, settings: Settings = Settings()) -> dict[str, LanguageScore]:  # noqa: B008
        name = loaded.directory.name
        return dict(score_each(loaded, documents, settings.resolve({name: read_max_positions(loaded.directory)}), name))

    return run


@pytest.fixture
def evaluate() -> Callable[..., None]:
    return partial(moelpr, "evaluate")


@pytest.fixture
def rejected(evaluate) -> Callable[..., str]:
    """Run the command with arguments that it must reject with exit code 2; returns the error message."""

    def run(*arguments: object) -> str:
        with pytest.raises(UserError) as error:
            evaluate(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


def score_of(bits, size=None, correct=None) -> LanguageScore:
    """A score whose documents are a byte and a token each, by default."""
    ones = [1] * len(bits)
    return LanguageScore(list(bits), list(size or ones), ones, list(correct or ones), unknown_tokens=0, routing=None)
