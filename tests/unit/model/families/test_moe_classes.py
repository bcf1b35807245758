import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from checkpoint_convert.compare.tensors import compare, compare_frozen, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.model.families.families import read_base
from moelpr.model.families.moe_classes import MOE_CLASSES
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import (
    assert_import_fails,
    assert_logits,
    assert_nothing_left,
    edit_json,
    edit_tensors,
    load_stock,
    our_logits,
    stock_logits,
    write_export,
)


@pytest.mark.parametrize(
    ("architecture", "changes", "moe_class", "message"),
    [
        ("LlamaForCausalLM", {}, "qwen2_moe", "it has biases in attention; pass --as mixtral or granitemoe"),
        ("LlamaForCausalLM", {}, "qwen3_moe", "it has norms of queries and keys; pass --as mixtral or granitemoe"),
        ("MistralForCausalLM", {"sliding_window": 6}, "granitemoe", "it has no sliding window; pass --as mixtral"),
        ("LlamaForCausalLM", {"head_dim": 16}, "granitemoe", "its heads are .* wide, not 16; pass --as mixtral"),
        ("Qwen2ForCausalLM", {}, "mixtral", "it has no biases in attention; pass --as qwen2_moe or granitemoe"),
        ("GraniteForCausalLM", {"residual_multiplier": 0.2}, "mixtral", "it has no multipliers; pass --as granitemoe"),
        ("Olmo2ForCausalLM", {}, "qwen3_moe", "it has no norms after attention and FFN; pass --as flex_olmo"),
        ("Ernie4_5ForCausalLM", {}, "mixtral", "it has no interleaved RoPE; pass --as ernie4_5_moe"),
        ("Qwen3ForCausalLM", {"head_dim": 8}, "mixtral", "it has no norms of queries and keys; pass --as qwen3_moe"),
    ],
)
def test_a_class_that_cannot_hold_a_model_is_refused(make_model, tmp_path, architecture, changes, moe_class, message):
    hf_to_mcore(make_model(architecture, **changes), tmp_path / "megatron", NewExperts(1))
    with pytest.raises(UserError, match=f"megatron cannot be written as .*{message}"):
        mcore_to_hf(tmp_path / "megatron", tmp_path / "out", as_class=moe_class)
    assert not (tmp_path / "out").exists()
    assert_nothing_left(tmp_path)


def test_granitemoe_has_experts_in_every_layer(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(1, moe_layers=[0, 2]))
    with pytest.raises(UserError, match="it has experts in every layer; pass --as qwen2_moe$"):
        mcore_to_hf(tmp_path / "megatron", tmp_path / "out", as_class="granitemoe")


def test_a_dense_model_has_no_class_to_choose(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", None)
    with pytest.raises(UserError, match="is dense; remove --as"):
        mcore_to_hf(tmp_path / "megatron", tmp_path / "out", as_class="mixtral")


@pytest.fixture
def dense(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    """A tied Qwen2, or what a test asks for."""
    architecture = getattr(request, "param", "Qwen2ForCausalLM")
    return make_model(architecture, tie_word_embeddings=architecture == "Qwen2ForCausalLM")


both = pytest.mark.parametrize("dense", ["LlamaForCausalLM", "Qwen2ForCausalLM"], indirect=True)


@pytest.fixture
def granite(dense: Path, tmp_path: Path) -> Path:
    """An export as GraniteMoe of the checkpoint tmp_path/megatron, which has two copies of the FFN."""
    hf_to_mcore(dense, tmp_path / "megatron", NewExperts(3, original_copies=2), start=Start(noise=0.5))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "granite", as_class="granitemoe")
    return tmp_path / "granite"


@both
def test_a_granitemoe_export_has_the_tensors_of_the_checkpoint_and_of_its_base(granite, dense, tmp_path) -> None:
    for a, b in ((granite, tmp_path / "megatron"), (tmp_path / "megatron", granite)):
        verdicts = list(compare(a, b))
        # In each layer: gate, up and down of 5 experts, and the router.
        assert sum("block_sparse_moe" in verdict.name for verdict in verdicts) == 4 * 16
        assert largest_difference(verdicts) == 0.0
    assert largest_difference(compare_frozen(dense, granite)) == 0.0
    edit_tensors(granite, lambda t: t["model.layers.1.block_sparse_moe.input_linear.weight"][1, 3, 5].add_(1))
    changed = [verdict.name for verdict in compare_frozen(dense, granite) if verdict.differs(0)]
    assert changed == ["model.layers.1.block_sparse_moe.input_linear.weight[1,:48]"]


@both
def test_a_granitemoe_is_extended_like_any_moe(granite: Path, tmp_path: Path) -> None:
    spec = hf_to_mcore(granite, tmp_path / "second", NewExperts(2), start=Start(noise=0.5))
    assert spec.moe is not None
    assert (spec.moe.original_copies, spec.moe.num_original_experts, spec.moe.num_experts) == (2, 4, 7)
    assert largest_difference(compare_frozen(granite, tmp_path / "second")) == 0.0
    # In its own class again, in the default of its family, and in the trainer.
    logits = []
    for name in (None, "granitemoe"):
        mcore_to_hf(tmp_path / "second", tmp_path / f"hf-{name}", as_class=name)
        logits.append(stock_logits(load_stock(tmp_path / f"hf-{name}")))
        config = json.loads((tmp_path / f"hf-{name}" / "config.json").read_text())
        assert config["original_copies"] == 2
        assert ("attention_multiplier" in config) == (name == "granitemoe")
    for actual in (logits[0], our_logits(tmp_path / "second")):
        assert_logits(actual, tmp_path / "hf-granitemoe")


def test_a_granitemoe_with_multipliers_is_extended(make_model, tmp_path: Path) -> None:
    """As IBM publishes it: the experts differ from each other, and the multipliers are those of no other class."""
    multipliers = {"embedding_multiplier": 6.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4}
    source = make_model("GraniteMoeForCausalLM", num_local_experts=3, logits_scaling=3.0, **multipliers)
    assert hf_to_mcore(source, tmp_path / "megatron", NewExperts(2), start=Start(noise=0.5)).family == "granite"
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert largest_difference(compare_frozen(source, tmp_path / "hf")) == 0.0
    exported = load_stock(tmp_path / "hf", "GraniteMoeForCausalLM")
    assert {name: getattr(exported.config, name) for name in multipliers} == multipliers
    assert_logits(our_logits(tmp_path / "megatron"), exported)


def test_shards_do_not_divide_stacked_experts(granite: Path, tmp_path: Path) -> None:
    mcore_to_hf(tmp_path / "megatron", tmp_path / "many", as_class="granitemoe", max_shard_bytes=40_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    assert_logits(stock_logits(tmp_path / "many"), granite)
    assert largest_difference(compare(tmp_path / "many", granite)) == 0.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_multiplier", 0.5, "attention_multiplier must be 0.35.* GraniteMoeForCausalLM, got 0.5"),
        ("residual_multiplier", 0.22, "residual_multiplier must be 1.0"),
    ],
)
def test_a_granitemoe_that_computes_something_else_is_rejected(granite, tmp_path, key, value, message) -> None:
    edit_json(granite / "config.json", **{key: value})
    assert_import_fails(granite, tmp_path, message, NewExperts(1))


def test_a_bias_that_qwen2_lacks_is_rejected(qwen2: Path, tmp_path: Path) -> None:
    write_export(qwen2, tmp_path, NewExperts(1), as_class="granitemoe")
    edit_tensors(tmp_path / "hf", lambda tensors: tensors["model.layers.2.self_attn.o_proj.bias"][7].add_(1))
    assert_import_fails(tmp_path / "hf", tmp_path, "layers.2.self_attn.o_proj.bias must be zero", NewExperts(1))


@pytest.mark.parametrize(("experts", "message"), [(4, r"lacks the tensor .*\[4,:48\]"), (6, "not in this size")])
def test_a_stack_with_another_number_of_experts_is_rejected(qwen2, tmp_path, experts, message) -> None:
    write_export(qwen2, tmp_path, NewExperts(4), as_class="granitemoe")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.block_sparse_moe.input_linear.weight"
        tensors[name] = tensors[name][torch.arange(experts) % 5].clone()

    edit_tensors(tmp_path / "hf", change)
    assert_import_fails(tmp_path / "hf", tmp_path, message, NewExperts(1))


@pytest.mark.parametrize("moe_class", MOE_CLASSES.values(), ids=lambda moe_class: moe_class.name)
def test_a_key_without_which_transformers_assumes_another_model_is_required(moe_class, tmp_path) -> None:
    config = CONFIG_MAPPING[moe_class.name]().to_dict() | {"architectures": [moe_class.architecture]}
    config.setdefault("intermediate_size", 512)  # Qwen3.5's class has none by itself
    for required in moe_class.required:
        (tmp_path / "config.json").write_text(json.dumps(config))
        edit_json(tmp_path / "config.json", remove=required.split(" or "))
        with pytest.raises(UserError, match=f"config.json lacks {required}; restore it"):
            read_base(tmp_path)
