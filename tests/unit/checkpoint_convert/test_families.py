"""Every family: in and out bit-identical, our model computes what transformers does, and the export is a stock MoE."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_convert.comparison import max_abs_difference
from checkpoint_convert.export import mcore_to_hf
from checkpoint_convert.upcycling import hf_to_mcore
from moelpr.errors import UserError
from moelpr.families.families import FAMILIES

LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Settings that a family's models have in the wild, and what its export must be.
MODELS = {
    "llama": ("LlamaForCausalLM", {}, "MixtralForCausalLM"),
    "llama 3.1": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}, "MixtralForCausalLM"),
    "llama 3.2, tied": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 16},
        "MixtralForCausalLM",
    ),
    "llama 2, no query groups": ("LlamaForCausalLM", {"num_key_value_heads": 4}, "MixtralForCausalLM"),
    "mistral 0.1, window": ("MistralForCausalLM", {"sliding_window": 6}, "MixtralForCausalLM"),
    "mistral 0.3": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}, "MixtralForCausalLM"),
    "qwen2": ("Qwen2ForCausalLM", {}, "Qwen2MoeForCausalLM"),
    "qwen2, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, "Qwen2MoeForCausalLM"),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, "Qwen3MoeForCausalLM"),
    "qwen3, tied": ("Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}, "Qwen3MoeForCausalLM"),
}
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 99


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> tuple[Path, str, str]:
    architecture, changes, moe_architecture = MODELS[request.param]
    return make_model(architecture, **changes), architecture, moe_architecture


def load_stock(folder: Path, architecture: str):
    """The model as a stranger's transformers loads it; fails on any missing or unexpected weight."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert type(model).__name__ == architecture
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["error_msgs"], info
    parameters = dict(model.named_parameters())
    missing = [name for name in info["missing_keys"] if parameters[name].numel()]  # a shared expert of width 0
    assert not missing, missing
    return model.eval()


@torch.no_grad()
def stock_logits(model) -> Tensor:
    return model(TOKENS).logits


def our_logits(folder: Path) -> Tensor:
    from moelpr.megatron_patches import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    from moelpr.model import loading

    with loading.single_process():
        return loading.logits(loading.load_model(folder), TOKENS)


def test_every_family_is_tried() -> None:
    assert {family.architecture for family in FAMILIES.values()} == {row[0] for row in MODELS.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS, ids=lambda name: name.replace(" ", "-"))
def test_dense_models_return_bit_identical(
    make_model: Callable[..., Path], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    architecture, changes, _ = MODELS[name]
    source = make_model(architecture, dtype, **changes)
    hf_to_mcore(source, tmp_path / "megatron", num_new_experts=None)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype and torch.equal(tensor, after[key]), key
    assert torch.equal(
        stock_logits(load_stock(source, architecture)), stock_logits(load_stock(tmp_path / "hf", architecture))
    )


def test_our_model_computes_what_transformers_computes(model: tuple[Path, str, str], tmp_path: Path) -> None:
    source, architecture, _ = model
    hf_to_mcore(source, tmp_path / "dense", num_new_experts=None)
    expected = stock_logits(load_stock(source, architecture))
    assert (our_logits(tmp_path / "dense") - expected).abs().max() <= 2e-5


def test_the_export_is_a_stock_moe_that_computes_what_our_model_does(
    model: tuple[Path, str, str], tmp_path: Path
) -> None:
    source, architecture, moe_architecture = model
    hf_to_mcore(source, tmp_path / "megatron", num_new_experts=3)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert max_abs_difference(tmp_path / "megatron", tmp_path / "hf") == 0.0
    dense, exported = load_stock(source, architecture), load_stock(tmp_path / "hf", moe_architecture)
    assert (stock_logits(exported) - stock_logits(dense)).abs().max() <= 2e-5
    assert (our_logits(tmp_path / "megatron") - stock_logits(exported)).abs().max() <= 2e-5

    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(dense.generate(TOKENS, **settings), exported.generate(TOKENS, **settings))


def test_a_trained_model_computes_the_same_in_both(model: tuple[Path, str, str], tmp_path: Path) -> None:
    """Experts that differ, as after training: which weight goes to which expert shows only then."""
    from checkpoint_convert.upcycling import Start

    source, architecture, moe_architecture = model
    hf_to_mcore(source, tmp_path / "megatron", num_new_experts=3, start=Start(noise=0.5))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    exported = load_stock(tmp_path / "hf", moe_architecture)
    ours = our_logits(tmp_path / "megatron")
    assert (ours - stock_logits(exported)).abs().max() <= 5e-5
    assert (ours - stock_logits(load_stock(source, architecture))).abs().max() > 1e-2


def test_config_of_the_export_speaks_the_old_and_the_new_spelling(model: tuple[Path, str, str], tmp_path: Path) -> None:
    """Readers other than transformers 5 know the old keys only, and all have defaults of their own."""
    source, _, moe_architecture = model
    hf_to_mcore(source, tmp_path / "megatron", num_new_experts=3, topk=3)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "hf"))
    rope = base["rope_parameters"]
    assert config["architectures"] == [moe_architecture]
    assert config["rope_parameters"] == rope and config["rope_theta"] == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert config["rope_scaling"] is None
    else:
        assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config["dtype"] == config["torch_dtype"] == "float32"
    kept = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
        "max_position_embeddings rms_norm_eps hidden_act initializer_range attention_dropout tie_word_embeddings"
    )
    assert {key: config[key] for key in kept.split()} == {key: base[key] for key in kept.split()}
    assert config["head_dim"] == (base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"])
    experts = {key: config[key] for key in ("num_experts", "num_local_experts") if key in config}
    assert (
        experts
        == {
            "MixtralForCausalLM": {"num_local_experts": 4},
            "Qwen2MoeForCausalLM": {"num_experts": 4},
            "Qwen3MoeForCausalLM": {"num_experts": 4, "num_local_experts": 4},
        }[moe_architecture]
    )
    assert config["num_experts_per_tok"] == 3
    if moe_architecture == "MixtralForCausalLM":
        assert config["sliding_window"] == base.get("sliding_window")
    else:
        assert config["norm_topk_prob"] is True and config["mlp_only_layers"] == []
        assert config["sliding_window"] is None and config["use_sliding_window"] is False
        assert config["moe_intermediate_size"] == base["intermediate_size"]


def test_what_a_config_leaves_out_has_the_dense_class_default(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Mistral's window is 4096 unless config.json says null; Mixtral's is none unless it says a number."""
    source = make_model("MistralForCausalLM", sliding_window=4096, num_key_value_heads=4, rms_norm_eps=1e-6)
    config = json.loads((source / "config.json").read_text())
    for key in ("sliding_window", "rms_norm_eps"):
        del config[key]
    (source / "config.json").write_text(json.dumps(config))
    hf_to_mcore(source, tmp_path / "megatron", num_new_experts=1)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["sliding_window"] == 4096
    assert exported["rms_norm_eps"] == 1e-6  # Mixtral's default is 1e-5


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias: true"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias: true"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias: true"),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 4096}},
            "original_max_position_embeddings .*8192.*4096",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            "'default'.*'llama3'.*'linear'",
        ),
    ],
)
def test_what_a_stock_moe_or_megatron_would_compute_differently(
    make_model: Callable[..., Path], tmp_path: Path, architecture: str, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        hf_to_mcore(make_model(architecture, **changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [{"moe_layers": [1]}, {"moe_every_k_layers": 2}])
def test_mixtral_has_experts_in_every_layer(make_model: Callable[..., Path], tmp_path: Path, layers: dict) -> None:
    with pytest.raises(UserError, match="MixtralForCausalLM.*--moe-layers"):
        hf_to_mcore(make_model("LlamaForCausalLM"), tmp_path / "out", **layers)
