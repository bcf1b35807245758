"""Every line of the table in docs/serving.md in llama.cpp and MLX: greedy text and log-probabilities.

The other way round too: where `obstacle` names a reason, the program fails or computes something else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_convert.card.readers import obstacle
from checkpoint_convert.compare.reader_requirements import unmet_requirements
from moelpr.model.families.hf_config import read_config
from moelpr.model.families.new_experts import NewExperts
from tests.readers import llama_cpp
from tests.support.hf_models import InDouble, in_double, load_stock, save_multimodal, write_export

VOCAB = 99
NUM_TOKENS = 12
TOLERANCE = 1e-4

LLAMA3_ROPE = dict(rope_theta=10000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3_ROPE["original_max_position_embeddings"] = 8192


@dataclass(frozen=True)
class Case:
    """An export: the dense model, how it is upcycled, and as what it is written."""

    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    as_class: str | None = None
    upcycling: dict[str, Any] = field(default_factory=dict)
    prompt_length: int = 24


TIED = {"tie_word_embeddings": True}
COPIES = {"original_copies": 2}
ONE_CHOICE = {"topk": 1}
# Its scaling shows at large distances only.
SCALED = {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 2048}
# Granite 3.3 2B's, but for that of attention, whose heads are wider there.
MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22}
MULTIPLIERS |= {"logits_scaling": 8.0}
HYBRID = {"head_dim": 256, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 256}
HYBRID |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "rope_parameters": None}
CASES = {
    "llama": Case("LlamaForCausalLM"),
    "llama-tied-copies": Case("LlamaForCausalLM", TIED, upcycling=COPIES),
    "llama-scaled": Case("LlamaForCausalLM", SCALED, prompt_length=1500),
    "llama-granitemoe": Case("LlamaForCausalLM", as_class="granitemoe", upcycling=COPIES),
    "llama-scaled-tied-granitemoe": Case("LlamaForCausalLM", SCALED | TIED, "granitemoe", prompt_length=1500),
    "mistral": Case("MistralForCausalLM", {"sliding_window": None}),
    "mistral-granitemoe": Case("MistralForCausalLM", {"sliding_window": None}, "granitemoe"),
    "mistral-window": Case("MistralForCausalLM", {"sliding_window": 6}),
    "mistral-wide-heads": Case("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "qwen2": Case("Qwen2ForCausalLM"),
    "qwen2-tied": Case("Qwen2ForCausalLM", TIED),
    "qwen2-granitemoe": Case("Qwen2ForCausalLM", as_class="granitemoe"),
    "qwen2-tied-copies-granitemoe": Case("Qwen2ForCausalLM", TIED, "granitemoe", COPIES),
    "qwen3": Case("Qwen3ForCausalLM", {"head_dim": 16}, upcycling=COPIES),
    "qwen3-tied": Case("Qwen3ForCausalLM", TIED | {"head_dim": 8}),
    "qwen3.5": Case("Qwen3_5ForCausalLM", HYBRID),
    "qwen3.5-tied-copies": Case("Qwen3_5ForCausalLM", TIED | HYBRID, upcycling=COPIES, prompt_length=100),
    "ernie4.5": Case("Ernie4_5ForCausalLM", {"head_dim": 16}, upcycling=COPIES),
    "helium": Case("HeliumForCausalLM", {"head_dim": 8, "rms_norm_eps": 1e-8}),
    "olmo2": Case("Olmo2ForCausalLM", {"num_key_value_heads": 4}),
    "granite": Case("GraniteForCausalLM", MULTIPLIERS, upcycling=COPIES),
    "granite-tied": Case("GraniteForCausalLM", MULTIPLIERS | TIED),
    "llama-one-choice": Case("LlamaForCausalLM", upcycling=ONE_CHOICE),
    "qwen2-one-choice-granitemoe": Case("Qwen2ForCausalLM", TIED, "granitemoe", ONE_CHOICE),
    "qwen3-one-choice": Case("Qwen3ForCausalLM", {"head_dim": 16}, upcycling=ONE_CHOICE),
    "qwen3.5-one-choice": Case("Qwen3_5ForCausalLM", HYBRID, upcycling=ONE_CHOICE),
    "ernie4.5-one-choice": Case("Ernie4_5ForCausalLM", {"head_dim": 16}, upcycling=ONE_CHOICE),
    "qwen3-dense-layers": Case("Qwen3ForCausalLM", {"head_dim": 8}, upcycling={"moe_layers": [1, 3]}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def export(case: Case, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that differ as after training, in fp32."""
    folder = tmp_path_factory.mktemp("export")
    dense = make_model(case.architecture, tokenizer=True, **case.changes)
    return write_export(dense, folder, NewExperts(3, **case.upcycling), noise=0.5, as_class=case.as_class)


def prompt_of(length: int) -> list[int]:
    return (torch.arange(length) * 7 % VOCAB).tolist()


@pytest.fixture(scope="module")
def prompt(case: Case) -> list[int]:
    return prompt_of(case.prompt_length)


@pytest.fixture(scope="module")
def expected(export: Path, prompt: list[int]) -> tuple[list[int], Tensor]:
    return in_transformers(export, prompt)


@torch.no_grad()
def in_transformers(folder: Path, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the log-probabilities [NUM_TOKENS, VOCAB] before each, computed in fp64."""
    model, tokens = in_double(load_stock(folder)), list(prompt)
    log_probs = []
    for _ in range(NUM_TOKENS):
        with InDouble():
            log_probs.append(model(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=-1))
        tokens.append(int(log_probs[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(log_probs)


def in_llama_cpp(folder: Path, prompt: list[int], tmp_path: Path) -> tuple[list[int], Tensor]:
    llama_cpp.convert(folder, tmp_path / "model.gguf")
    return llama_cpp.generate(tmp_path / "model.gguf", prompt, NUM_TOKENS, VOCAB)


def in_mlx(folder: Path, prompt: list[int], tmp_path: Path) -> tuple[list[int], Tensor]:
    import mlx.core
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    steps = list(generate_step(mlx.core.array(prompt), load_model(folder)[0], max_tokens=NUM_TOKENS))
    return [int(token) for token, _ in steps], torch.stack([torch.tensor(scores.tolist()) for _, scores in steps])


# Their errors if a directory cannot be loaded.
LOAD_ERRORS: dict[str, tuple[type[BaseException], ...]] = {
    "llama.cpp": (ValueError, RuntimeError, SystemExit),
    "mlx": (ValueError, ZeroDivisionError, TypeError),
}
RUN = {"llama.cpp": in_llama_cpp, "mlx": in_mlx}


@pytest.mark.parametrize("reader", RUN)
def test_a_reader_computes_what_transformers_does_unless_an_obstacle_is_named(
    export: Path, prompt: list[int], expected: tuple[list[int], Tensor], reader: str, tmp_path: Path
) -> None:
    tokens, log_probs = expected
    reason = obstacle(reader, read_config(export))
    assert [unmet.split(": ")[-1] for unmet in unmet_requirements(export, reader)] == ([reason] if reason else [])
    try:
        found_tokens, actual = RUN[reader](export, prompt, tmp_path)
    except LOAD_ERRORS[reader]:
        assert reason is not None
        return
    if reason is None:
        assert found_tokens == tokens
        assert (actual - log_probs).abs().max() <= TOLERANCE
    else:
        assert (actual[0] - log_probs[0]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("reader", RUN)
def test_a_whole_multimodal_model_runs_as_its_language_model(make_model, reader: str, tmp_path: Path) -> None:
    dense = make_model("Qwen3_5ForCausalLM", tokenizer=True, **HYBRID)
    whole = save_multimodal(dense, tmp_path / "base")
    write_export(whole, tmp_path, NewExperts(3), noise=0.5, multimodal_base=whole)
    assert obstacle(reader, read_config(tmp_path / "hf")) is None
    tokens, expected = in_transformers(tmp_path / "hf", prompt_of(100))
    found_tokens, actual = RUN[reader](tmp_path / "hf", prompt_of(100), tmp_path)
    assert found_tokens == tokens and (actual - expected).abs().max() <= TOLERANCE
