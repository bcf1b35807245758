import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoint_convert.compare.tensors import compare, compare_frozen, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.model.families.families import FAMILIES, read_base
from moelpr.model.families.moe_classes import MOE_CLASSES
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import (
    HYBRID,
    SHAPE,
    TOKENS,
    assert_import_fails,
    assert_logits,
    edit_json,
    edit_tensors,
    load_stock,
    our_logits,
    stock_logits,
    write_export,
)

PLAIN_ROPE = {"rope_theta": 1e4, "rope_type": "default"}
LLAMA3_ROPE = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_3_2 = {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}
# Granite 3.3 2B has these, but for the scale of attention, which fits its wider heads.
GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22}
GRANITE |= {"logits_scaling": 10.0}
# A tiny Granite 4 without Mamba layers, whose settings must fit even so.
GRANITE_4 = {"layer_types": ["attention"] * 4, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 4}
GRANITE_4 |= {"shared_intermediate_size": 48, "position_embedding_type": "rope"}
GRANITE_4_CLASS = "GraniteMoeHybridForCausalLM"
ALL_ROTATED = HYBRID | {"tie_word_embeddings": True, "layer_types": ["full_attention", "linear_attention"] * 2}
ALL_ROTATED |= {"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 1.0}, "linear_num_value_heads": 2}

# Settings of published models of each family, and the class of their export.
MODELS = {
    "llama": ("LlamaForCausalLM", {}, "MixtralForCausalLM"),
    "llama 3.1": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}, "MixtralForCausalLM"),
    "llama 3.2, tied": ("LlamaForCausalLM", LLAMA_3_2 | {"head_dim": 16}, "MixtralForCausalLM"),
    "llama 2, no query groups": ("LlamaForCausalLM", {"num_key_value_heads": 4}, "MixtralForCausalLM"),
    "iquest coder": ("IQuestCoderForCausalLM", {"head_dim": 16}, "MixtralForCausalLM"),
    "mistral 0.1, window": ("MistralForCausalLM", {"sliding_window": 6}, "MixtralForCausalLM"),
    "mistral 0.3": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}, "MixtralForCausalLM"),
    "qwen2": ("Qwen2ForCausalLM", {}, "Qwen2MoeForCausalLM"),
    "qwen2, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, "Qwen2MoeForCausalLM"),
    "llama as granitemoe": ("LlamaForCausalLM", {}, "GraniteMoeForCausalLM"),
    "llama 3.2 as granitemoe": ("LlamaForCausalLM", LLAMA_3_2, "GraniteMoeForCausalLM"),
    "qwen2 as granitemoe": ("Qwen2ForCausalLM", {}, "GraniteMoeForCausalLM"),
    "qwen2, tied, as granitemoe": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, "GraniteMoeForCausalLM"),
    "granite 3.3": ("GraniteForCausalLM", GRANITE, "GraniteMoeForCausalLM"),
    "granite, tied": ("GraniteForCausalLM", GRANITE | {"tie_word_embeddings": True}, "GraniteMoeForCausalLM"),
    "granite 4": (GRANITE_4_CLASS, GRANITE | GRANITE_4, "GraniteMoeForCausalLM"),
    "phi-3, window": ("Phi3ForCausalLM", {"sliding_window": 6, "pad_token_id": 0}, "MixtralForCausalLM"),
    "phi-4": ("Phi3ForCausalLM", {"sliding_window": None, "pad_token_id": 0}, "MixtralForCausalLM"),
    "ernie 4.5, tied": ("Ernie4_5ForCausalLM", {"head_dim": 16}, "Ernie4_5_MoeForCausalLM"),
    "helium": ("HeliumForCausalLM", {"head_dim": 8, "rms_norm_eps": 1e-8}, "Ernie4_5_MoeForCausalLM"),
    "olmo 2": ("Olmo2ForCausalLM", {"num_key_value_heads": 4}, "FlexOlmoForCausalLM"),
    "olmo 2 32B": ("Olmo2ForCausalLM", {}, "FlexOlmoForCausalLM"),
    "seed-oss": ("SeedOssForCausalLM", {"head_dim": 16, "attention_dropout": 0.1}, "Qwen2MoeForCausalLM"),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, "Qwen3MoeForCausalLM"),
    "qwen3.5": ("Qwen3_5ForCausalLM", HYBRID, "Qwen3_5MoeForCausalLM"),
    "qwen3.5, tied, all rotated": ("Qwen3_5ForCausalLM", ALL_ROTATED, "Qwen3_5MoeForCausalLM"),
    "qwen3, tied": ("Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}, "Qwen3MoeForCausalLM"),
}


def chosen(architecture: str, moe_architecture: str) -> str | None:
    """The class to name in --as; None if it is the family's default."""
    default = next(family.moe_class for family in FAMILIES.values() if family.architecture == architecture)
    names = {kind.architecture: kind.name for kind in MOE_CLASSES.values()}
    return None if default.architecture == moe_architecture else names[moe_architecture]


DENSE = [name for name, (architecture, _, moe) in MODELS.items() if chosen(architecture, moe) is None]


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> tuple[Path, str, str]:
    architecture, changes, moe_architecture = MODELS[request.param]
    return make_model(architecture, **changes), architecture, moe_architecture


def test_every_family_is_tested() -> None:
    assert {family.architecture for family in FAMILIES.values()} == {row[0] for row in MODELS.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DENSE, ids=lambda name: name.replace(" ", "-"))
def test_dense_models_return_bitwise_identical(make_model, tmp_path, name, dtype) -> None:
    architecture, changes, _ = MODELS[name]
    source = make_model(architecture, dtype, **changes)
    write_export(source, tmp_path, None)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype and torch.equal(tensor, after[key]), key
    if dtype == torch.float32:
        assert torch.equal(*(stock_logits(load_stock(one, architecture)) for one in (source, tmp_path / "hf")))


@pytest.mark.parametrize("model", DENSE, ids=lambda name: name.replace(" ", "-"), indirect=True)
def test_our_model_computes_what_transformers_computes(model: tuple[Path, str, str], tmp_path: Path) -> None:
    source, architecture, _ = model
    hf_to_mcore(source, tmp_path / "dense", None)
    assert_logits(our_logits(tmp_path / "dense"), load_stock(source, architecture))


def test_the_export_is_a_stock_moe_that_computes_what_our_model_does(model, tmp_path) -> None:
    source, architecture, moe_architecture = model
    write_export(source, tmp_path, NewExperts(3), as_class=chosen(architecture, moe_architecture))
    assert largest_difference(compare(tmp_path / "megatron", tmp_path / "hf")) == 0.0
    dense, exported = load_stock(source, architecture), load_stock(tmp_path / "hf", moe_architecture)
    assert_logits(stock_logits(exported), dense)
    assert_logits(our_logits(tmp_path / "megatron"), exported)

    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(dense.generate(TOKENS, **settings), exported.generate(TOKENS, **settings))


def test_a_trained_model_computes_the_same_in_both(model: tuple[Path, str, str], tmp_path: Path) -> None:
    """Experts that differ, as after training: which weight goes to which expert shows only then."""
    source, architecture, moe_architecture = model
    write_export(source, tmp_path, NewExperts(3), noise=0.5, as_class=chosen(architecture, moe_architecture))
    exported = load_stock(tmp_path / "hf", moe_architecture)
    ours = our_logits(tmp_path / "megatron")
    assert_logits(ours, exported)
    assert (ours - stock_logits(load_stock(source, architecture))).abs().max() > 1e-3


def test_a_token_may_use_one_expert_with_a_weight_of_one(model: tuple[Path, str, str], tmp_path: Path) -> None:
    """Our model, the stock class and, where all tokens choose the dense FFN, the dense model compute the same."""
    source, architecture, moe_architecture = model
    as_class = chosen(architecture, moe_architecture)
    write_export(source, tmp_path, NewExperts(1, topk=1), noise=0.5, as_class=as_class)
    exported, dense = load_stock(tmp_path / "hf", moe_architecture), load_stock(source, architecture)
    ours = our_logits(tmp_path / "megatron")
    assert_logits(ours, exported)
    assert (ours - stock_logits(dense)).abs().max() > 1e-3
    edit_tensors(tmp_path / "hf", zero_routers)  # top-k takes the first of equal logits
    assert_logits(stock_logits(tmp_path / "hf"), dense)
    if moe_architecture == "MixtralForCausalLM":
        again = hf_to_mcore(tmp_path / "hf", tmp_path / "second", NewExperts(1)).moe
        assert again is not None and (again.topk, again.num_original_experts, again.num_experts) == (1, 2, 3)


def zero_routers(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if re.search(r"(mlp|moe)\.(gate|router\.layer)\.weight", name):
            tensors[name].zero_()


def test_the_exported_config_has_old_and_new_names(model: tuple[Path, str, str], tmp_path: Path) -> None:
    """Readers other than transformers 5 read only the old keys, and all have their own defaults."""
    source, architecture, moe_architecture = model
    write_export(source, tmp_path, NewExperts(3, topk=3), as_class=chosen(architecture, moe_architecture))
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "hf"))
    rope = dict(base["rope_parameters"])
    if moe_architecture != "Qwen3_5MoeForCausalLM":  # the others turn all channels, and have no key for it
        assert rope.pop("partial_rotary_factor", 1) == 1
    assert config["architectures"] == [moe_architecture]
    assert config["rope_parameters"] == rope and config["rope_theta"] == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert config["rope_scaling"] is None
    else:
        assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config["dtype"] == config["torch_dtype"] == "float32"
    kept = (
        set(
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
            "max_position_embeddings rms_norm_eps hidden_act initializer_range attention_dropout tie_word_embeddings "
            "linear_num_key_heads linear_num_value_heads linear_key_head_dim".split()
        )
        | GRANITE.keys()
    )
    for key in kept & base.keys() & config.keys():
        assert config[key] == base[key] or (key, base["model_type"]) == ("attention_dropout", "ernie4_5"), key
    assert config["head_dim"] == (base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"])
    assert {config[key] for key in ("num_experts", "num_local_experts", "moe_num_experts") if key in config} == {4}
    assert config["moe_k" if "moe_k" in config else "num_experts_per_tok"] == 3
    assert config.get("norm_topk_prob", True) is True and not config.get("mlp_only_layers")
    assert config.get("moe_intermediate_size", base["intermediate_size"]) == base["intermediate_size"]
    window = base.get("sliding_window") if moe_architecture == "MixtralForCausalLM" else None
    assert config.get("sliding_window") == window
    # From layer types, vLLM would conclude that a GraniteMoe has attention sinks.
    assert config.get("layer_types") == (base["layer_types"] if moe_architecture.startswith("Qwen3_5") else None)


def test_joined_projections_are_compared_split(make_model, tmp_path: Path) -> None:
    """Phi-3 joins queries, keys and values, and gate and up projection; Mixtral has them apart."""
    source = make_model("Phi3ForCausalLM", pad_token_id=0)
    write_export(source, tmp_path, NewExperts(2), noise=0.5)
    verdicts = list(compare_frozen(source, tmp_path / "hf"))
    assert largest_difference(verdicts) == 0.0
    assert {v.name for v in verdicts} >= {
        f"model.layers.3.self_attn.qkv_proj.weight[{r}]" for r in (":32", "32:48", "48:")
    }


def test_a_key_missing_in_the_config_has_the_default_of_the_dense_class(make_model, tmp_path) -> None:
    """Without the key, Mistral's window is 4096 and Mixtral has none."""
    source = make_model("MistralForCausalLM", sliding_window=4096, num_key_value_heads=4, rms_norm_eps=1e-6)
    edit_json(source / "config.json", remove=("sliding_window", "rms_norm_eps"))
    write_export(source, tmp_path, NewExperts(1))
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["sliding_window"] == 4096
    assert exported["rms_norm_eps"] == 1e-6  # Mixtral's default is 1e-5


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (GRANITE_4_CLASS, {"num_local_experts": 4, "num_experts_per_tok": 2}, "num_local_experts must be 0"),
        (GRANITE_4_CLASS, {"position_embedding_type": None}, "position_embedding_type must be 'rope'"),
        (GRANITE_4_CLASS, {"layer_types": ["mamba", "attention"] * 2}, "layer_types .*linear_attention"),
        ("GraniteForCausalLM", {"residual_multiplier": 0.0}, "residual_multiplier must be above 0"),
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias: true"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias: true"),
        ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2.0}}, "low_freq_factor .*1.0.*2.0"),
        ("SeedOssForCausalLM", {"attention_out_bias": True}, "attention_out_bias: true"),
        ("SeedOssForCausalLM", {"attention_bias": False}, "attention_bias: false"),
        ("Ernie4_5ForCausalLM", {"use_bias": True}, "use_bias: true"),
        (
            "Phi3ForCausalLM",
            {"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.75}},
            ".* must be 1, got 0.75",
        ),
    ],
)
def test_settings_of_one_family_that_another_model_has_are_rejected(tmp_path, architecture, changes, message) -> None:
    base = SHAPE | {"pad_token_id": 0} | (GRANITE_4 if architecture == GRANITE_4_CLASS else {})
    getattr(transformers, architecture).config_class(**(base | changes)).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=[architecture])
    with pytest.raises(UserError, match=f"config.json: {message}"):
        read_base(tmp_path)


@pytest.mark.parametrize("layers", [{"moe_layers": [1]}, {"moe_every_k_layers": 2}])
def test_mixtral_has_experts_in_every_layer(make_model: Callable[..., Path], tmp_path: Path, layers: dict) -> None:
    with pytest.raises(UserError, match="MixtralForCausalLM.*--moe-layers"):
        hf_to_mcore(make_model("LlamaForCausalLM"), tmp_path / "out", NewExperts(4, **layers))


@pytest.mark.parametrize("value", ["x", [1], 10**400])
@pytest.mark.parametrize("key", ["head_dim", "hidden_size", "num_attention_heads", "logits_scaling"])
def test_a_size_of_a_wrong_type_is_rejected(tmp_path: Path, key: str, value: object) -> None:
    config = SHAPE | {"pad_token_id": 0, "num_local_experts": 2, "num_experts_per_tok": 1}
    transformers.GraniteMoeConfig(**config).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=["GraniteMoeForCausalLM"], **{key: value})
    with pytest.raises(UserError):
        read_base(tmp_path)


def test_a_folder_without_config_is_rejected(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    assert_import_fails(source, tmp_path, "source/config.json; .*hf download")


def test_a_gguf_is_rejected_as_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "Q4.gguf").touch()
    for given in (tmp_path / "model", tmp_path / "model" / "Q4.gguf"):
        assert_import_fails(given, tmp_path, "is a GGUF.*pass the Hugging Face directory")


@pytest.mark.parametrize("text", ["[]", '{"model_type": []}', "[" * 200_000])
def test_a_config_that_is_not_a_json_object_of_texts_is_rejected(source: Path, tmp_path: Path, text: str) -> None:
    (source / "config.json").write_text(text)
    assert_import_fails(source, tmp_path, "config.json: .*; download it again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps.* got nan"),
        ({"rms_norm_eps": 0.0}, "epsilon"),
        ({"attention_dropout": 3}, "attention_dropout.* got 3"),
        ({"initializer_range": float("inf")}, "initializer_range.* got inf"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": PLAIN_ROPE | {"rope_type": "yarn", "factor": 4.0}}, "'default'.*'llama3'.*'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'llama3'.*'dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act.*'silu'.*'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized \\(quantization_config\\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "is quantized \\(quantization\\)"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights.*remove"),
        ({"rope_parameters": {"full_attention": PLAIN_ROPE}}, "full_attention"),
        ({"per_layer_config": {"1": {"intermediate_size": 32}}}, "per_layer_config"),
        ({"rope_parameters": PLAIN_ROPE | {"rope_theta": 1000.5}}, "rope_theta.*1000.5"),
    ],
)
def test_a_model_that_megatron_computes_differently_is_rejected(source, tmp_path, changes, message) -> None:
    edit_json(source / "config.json", **changes)
    assert_import_fails(source, tmp_path, message)


def test_a_llama_with_a_window_that_transformers_ignores_has_none(make_model, tmp_path) -> None:
    source = Path(shutil.copytree(make_model("LlamaForCausalLM"), tmp_path / "source"))
    edit_json(source / "config.json", sliding_window=6)
    assert "window_size" not in hf_to_mcore(source, tmp_path / "megatron", NewExperts(1)).megatron_args
    for as_class in ("mixtral", "granitemoe"):
        mcore_to_hf(tmp_path / "megatron", tmp_path / as_class, as_class=as_class)
        assert json.loads((tmp_path / as_class / "config.json").read_text()).get("sliding_window") is None
        assert_logits(stock_logits(tmp_path / as_class), source)
    edit_json(tmp_path / "granitemoe" / "config.json", sliding_window=6)
    assert "window_size" not in hf_to_mcore(tmp_path / "granitemoe", tmp_path / "second", NewExperts(1)).megatron_args


def test_old_configs_with_a_plain_rope_theta_are_read(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    source = make_qwen2()
    old = {"rope_theta": 50000.0, "torch_dtype": "float32"}
    edit_json(source / "config.json", remove=("rope_parameters", "dtype"), **old)
    assert hf_to_mcore(source, tmp_path / "megatron", NewExperts(4)).megatron_args["rotary_base"] == 50000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob must be True .*Qwen2MoeForCausalLM.* False"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size .*0.* 64"),
        ({"mlp_only_layers": [0], "moe_intermediate_size": 24}, "48 and 24"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step .*1.* 2"),
        ({"num_experts": 1 << 31}, "at most 4096 experts"),
    ],
)
def test_unsupported_mixtures_are_rejected(make_model, tmp_path, changes, message) -> None:
    folder = write_export(make_model("Qwen2ForCausalLM"), tmp_path / "first", NewExperts(2), noise=0.5)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit_json(other / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        hf_to_mcore(other, tmp_path / "out", NewExperts(1))
    with pytest.raises(UserError, match="is an MoE.*--num-new-experts"):
        hf_to_mcore(folder, tmp_path / "out", None)


def test_k_is_that_of_the_mixture_by_default(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_export(make_model("LlamaForCausalLM"), tmp_path / "first", NewExperts(2, topk=3), noise=0.5)
    assert hf_to_mcore(folder, tmp_path / "own", NewExperts(1)).moe.topk == 3
    assert hf_to_mcore(folder, tmp_path / "asked", NewExperts(1, topk=2)).moe.topk == 2


def test_code_in_a_folder_is_refused_without_a_question(qwen2, tmp_path, monkeypatch) -> None:
    """transformers would ask at a terminal, and "y" would run it."""
    folder = Path(shutil.copytree(qwen2, tmp_path / "model"))
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert_import_fails(folder, tmp_path, "transformers cannot read .*config.json")
    assert not (tmp_path / "ran").exists()


def test_token_ids_that_a_base_leaves_to_its_class_are_those_of_its_class(make_qwen2, tmp_path) -> None:
    """GraniteMoe's own end of text is token 2, at which generation would stop."""
    source = make_qwen2()
    edit_json(source / "config.json", remove=("bos_token_id", "eos_token_id", "pad_token_id"))
    write_export(source, tmp_path, NewExperts(1), as_class="granitemoe")
    exported = load_stock(tmp_path / "hf", "GraniteMoeForCausalLM").config
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (None, None, None)
