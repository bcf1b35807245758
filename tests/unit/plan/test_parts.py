"""Parameter counts against models that are really built, and against the whole model in every layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.plan.layouts import Layout
from moelpr.plan.memory import Run, divisor, held_on_stage, stage_memories
from moelpr.plan.model import model_parts, upcycled_spec
from moelpr.plan.parts import padded_vocabulary
from moelpr.stages import Part

SHAPE = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 8, "max_position_embeddings": 64, "position_embedding_type": "rope",
    "rotary_base": 10000, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "swiglu": True, "add_bias_linear": False,
    "add_qkv_bias": True, "qk_layernorm": False, "untie_embeddings_and_output_weights": False, "vocab_size": 128,
}  # fmt: skip


def spec_of(layers: tuple[int, ...] = (0, 1, 2, 3), num_original_experts: int = 1, **changes: object) -> ModelSpec:
    return ModelSpec("qwen2", "float32", SHAPE | changes, MoeSpec(4, 2, layers, num_original_experts))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("is_untied", [False, True])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_counts_equal_those_of_a_built_model(is_untied: bool, layers: tuple[int, ...], m: int, stage: str) -> None:
    from moelpr.model.freezing import freeze
    from moelpr.model.loading import build_model

    spec = spec_of(layers, m, untie_embeddings_and_output_weights=is_untied)
    (model,) = freeze([build_model(spec)], stage)
    rank = stage_memories(spec, model_parts(spec), Layout(), Run(stage, 64, 1, 1))[0]
    assert rank.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert rank.frozen == sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("is_untied", [False, True])
def test_counts_of_a_dense_model_equal_those_of_a_built_one(is_untied: bool) -> None:
    from moelpr.model.loading import build_model

    spec = spec_of(untie_embeddings_and_output_weights=is_untied).as_dense()
    held = held_on_stage(spec, model_parts(spec), Layout(), 0)
    assert sum(held.values()) == sum(parameter.numel() for parameter in build_model(spec).parameters())
    assert not {Part.ROUTER, Part.NEW_EXPERTS, Part.ORIGINAL_EXPERTS} & set(held)


def test_the_spec_is_the_one_the_converter_would_write(config_folder: Callable[..., Path]) -> None:
    spec = upcycled_spec(config_folder(), num_new_experts=3, moe_every_k_layers=2)
    assert spec.moe == MoeSpec(3, 2, (1, 3))
    assert spec.megatron_args["ffn_hidden_size"] == 96


layouts = st.builds(
    lambda tp, pp, ep, split, dp: Layout(tp, pp, ep, tp if split else 1, dp * ep),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([1, 2, 3]),
)
specs = st.builds(
    spec_of,
    st.sets(st.integers(0, 3), min_size=1).map(lambda chosen: tuple(sorted(chosen))),
    st.integers(1, 3),
    untie_embeddings_and_output_weights=st.booleans(),
    vocab_size=st.sampled_from([99, 128, 1000]),
)


@given(spec=specs, layout=layouts)
@settings(max_examples=100, deadline=None)
def test_the_shards_of_all_ranks_are_the_whole_model(spec: ModelSpec, layout: Layout) -> None:
    """Sum over all ranks, each kind divided by the number of ranks that hold the same shard."""
    parts = model_parts(spec)
    ranks_of_a_stage = layout.tp * layout.dp
    found: dict[Part, float] = {}
    for pp_rank in range(layout.pp):
        for kind, numel in held_on_stage(spec, parts, layout, pp_rank).items():
            copies = ranks_of_a_stage // divisor(kind, layout)
            found[kind] = found.get(kind, 0) + ranks_of_a_stage * numel / copies
    whole: dict[Part, float] = {}
    for part in parts:
        whole[part.part] = whole.get(part.part, 0) + part.numel
    padded = padded_vocabulary(spec.megatron_args["vocab_size"], layout.tp) * spec.megatron_args["hidden_size"]
    is_tied = not spec.megatron_args["untie_embeddings_and_output_weights"]
    whole[Part.EMBEDDING] = padded * (2 if is_tied and layout.pp > 1 else 1)
    if not is_tied:
        whole[Part.OUTPUT_LAYER] = padded
    assert found == whole


@given(spec=specs, layout=layouts, stage=st.sampled_from(["stage1", "stage2"]))
@settings(max_examples=100, deadline=None)
def test_optimizer_state_of_all_ranks_is_one_copy_per_trained_parameter(
    spec: ModelSpec, layout: Layout, stage: str
) -> None:
    """12 bytes each in bf16; a router once per tensor-parallel rank, since those hold it whole. Rounding up apart."""
    parts = model_parts(spec)
    run = Run(stage, 64, 1, layout.dp)
    total = layout.tp * layout.dp * sum(rank.optimizer_bytes for rank in stage_memories(spec, parts, layout, run))
    routers = sum(part.numel for part in parts if part.part is Part.ROUTER)
    new_experts = sum(part.numel for part in parts if part.part is Part.NEW_EXPERTS)
    exact = 12 * (layout.tp * routers + (new_experts if stage == "stage1" else 0))
    assert exact <= total <= exact + 12 * 2 * layout.world


@pytest.mark.parametrize("m", [1, 3])
def test_the_original_experts_are_on_every_expert_parallel_rank(m: int) -> None:
    spec = spec_of(num_original_experts=m)
    parts = model_parts(spec)
    alone = held_on_stage(spec, parts, Layout(), 0)
    spread = held_on_stage(spec, parts, Layout(ep=4, dp=4), 0)
    assert spread[Part.ORIGINAL_EXPERTS] == alone[Part.ORIGINAL_EXPERTS] == m * 4 * 3 * 32 * 48
    assert spread[Part.NEW_EXPERTS] * 4 == alone[Part.NEW_EXPERTS]
    split = held_on_stage(spec, parts, Layout(tp=2, etp=2), 0)
    assert split[Part.ORIGINAL_EXPERTS] * 2 == alone[Part.ORIGINAL_EXPERTS]
