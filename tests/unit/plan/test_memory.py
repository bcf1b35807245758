"""Memory per rank: an example worked out by hand, models that are really built, and the full model in every layout."""

from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.model.layers.freezing import freeze
from moelpr.model.layers.loading import build_model
from moelpr.model.model_spec import ModelSpec, MoeSpec, NewTokens
from moelpr.model.stages import DENSE_STAGES, Part, Stage
from moelpr.plan.layouts import PlannedLayout, Recompute
from moelpr.plan.memory import (
    CPU,
    Activations,
    Dtype,
    Routing,
    Workload,
    divisor,
    held_on_stage,
    model_parts,
    padded_vocabulary,
    stage_memories,
)
from tests.support.saved_tensors import SavedTensors
from tests.unit.conftest import SHAPE
from tests.unit.plan.conftest import ROUTING, SMALL_SHAPE, SPEC, WORKLOAD

# Stage, new_embeddings, train_everything.
TRAININGS = [*((stage, False, False) for stage in get_args(Stage)), ("stage1", True, False), ("stage1", False, True)]
TRAININGS += [("stage2", False, True)]
PARTS = model_parts(SPEC)
ALONE = PlannedLayout(distributed_optimizer=False)

NEW_EXPERTS = 2 * 2 * 3 * 8 * 16  # layers · N · (gate, up, down)
ROUTERS = 2 * 3 * 8
ATTENTION = 16 * 8 + 16 + 8 * 8
FROZEN = 2 * (3 * 8 * 16 + ATTENTION + 2 * 8) + 8 + 2 * 128 * 8  # the vocabulary of 100 is padded to 128

MOE_INSIDE = 4 * (2 * 12 + 3 * 4 + 2 * 8 + 2 * 8) + 2 * ((2 * 16 + 8) * 2 + 12) + 6 * ((3 * 16 + 8) * 2 + 12)
MOE_INPUT = 4 * 8 * 2
NORM = 4 * (8 * 2 + 4)
ATTENTION_KEPT = 4 * (16 + 12 + 8) * 2 + 4 * 2 * 4
FIRST, SECOND = MOE_INPUT + MOE_INSIDE, 2 * NORM + ATTENTION_KEPT + MOE_INPUT + MOE_INSIDE  # layers
HEAD = NORM + 4 * (8 * 2 + 4 * 4)


def memory(layout: PlannedLayout = ALONE, workload: Workload = WORKLOAD, pp_rank: int = 0):
    return stage_memories(SPEC, PARTS, layout, workload, ROUTING)[pp_rank]


@pytest.mark.parametrize(
    ("dtype", "options", "weight", "optimizer", "host"),
    [
        ("bf16", {}, 2, 12, 0),
        ("fp32", {}, 4, 8, 0),  # no master weights
        ("bf16", {"bf16_moments": True}, 2, 6, 0),  # two moments of 2 bytes, and the 16 bits that a weight lacks
        # On the host a copy, two moments and a gradient of 4 bytes each, and as much more for rounding.
        ("bf16", {"optimizer_cpu_offload": True}, 2, 0, 20),
        ("fp32", {"optimizer_cpu_offload": True}, 4, 0, 20),
    ],
)
def test_bytes_per_trained_and_per_frozen_parameter(dtype: Dtype, options, weight, optimizer, host) -> None:
    rank, trained = memory(workload=replace(WORKLOAD, dtype=dtype, **options)), NEW_EXPERTS + ROUTERS
    assert (rank.trainable, rank.frozen) == (trained, FROZEN)
    assert rank.parameter_bytes == weight * (trained + FROZEN)
    assert (rank.gradient_bytes, rank.optimizer_bytes) == (4 * trained, optimizer * trained)
    assert rank.host_bytes == host * trained
    assert rank.activation_bytes == memory(workload=replace(WORKLOAD, dtype=dtype)).activation_bytes


def test_a_second_original_expert_adds_frozen_weights_and_a_trained_router_row() -> None:
    """On every expert-parallel rank; divided over expert-tensor-parallel ranks."""
    spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=2))
    parts, expert = model_parts(spec), 2 * 3 * 8 * 16  # layers · (gate, up, down)
    for layout, share in ((ALONE, 1), (PlannedLayout(ep=2, dp=2), 1), (PlannedLayout(tp=2, etp=2), 2)):
        one, two = memory(layout), stage_memories(spec, parts, layout, WORKLOAD, ROUTING)[0]
        assert (two.frozen - one.frozen, two.trainable - one.trainable) == (expert // share, 2 * 8)


def test_expert_tensor_parallel_ranks_share_the_ffn_and_process_the_rows_of_all() -> None:
    """Two ranks have half of the tokens each; alone, a rank has its own rows and all of the FFN."""
    alone, pair, shared = (
        Activations(SPEC, layout, WORKLOAD, ROUTING)
        for layout in (ALONE, PlannedLayout(tp=2), PlannedLayout(tp=2, etp=2))
    )
    assert (pair.original_rows, pair.new_rows) == (alone.original_rows / 2, alone.new_rows / 2)
    assert (shared.original_rows, shared.new_rows) == (alone.original_rows, alone.new_rows)
    assert (pair.expert_ffn, shared.expert_ffn) == (alone.expert_ffn, alone.expert_ffn / 2)
    hidden, ffn = alone.hidden, alone.expert_ffn
    rows = alone.new_rows * (3 * ffn / 2 + hidden) + alone.original_rows * (2 * ffn / 2 + hidden)
    logits = shared.all_tokens * shared.vocabulary
    assert shared.working(0) == max(rows, logits) * shared.element


def test_copies_of_the_ffn_add_only_router_rows_and_fewer_rows_to_compute() -> None:
    """Among 6 places, 2 are the FFN: with K = 2, 1 - 4/6 * 3/5 of the tokens choose at least one of them."""
    two = replace(SPEC, moe=replace(SPEC.moe, original_copies=2))
    rows = two.moe.num_experts * 8 * 2
    sizes = [sum(model_parts(spec).values()) for spec in (SPEC, two)]
    assert sizes[1] - sizes[0] == rows - SPEC.moe.num_experts * 8 * 2 == 2 * 8
    later_round = MoeSpec(num_new_experts=3, topk=2, layers=(0,), num_original_experts=2)
    assert Routing.uniform(later_round) == Routing(original_rows=0.8, new_rows=1.2)
    uniform = Routing.uniform(MoeSpec(num_new_experts=4, topk=2, layers=(0,), original_copies=2))
    assert uniform.original_rows == pytest.approx(0.6)
    assert uniform.new_rows == pytest.approx(2 * 4 / 6)
    assert Routing.uniform(later_round, "new") == Routing(original_rows=0, new_rows=2)


def test_activations_worked_out_by_hand() -> None:
    """Nothing below the first router needs a gradient: the first layer keeps no norms and no attention."""
    assert memory().activation_bytes == FIRST + SECOND + HEAD == 3216


def test_stage2_keeps_neither_input_nor_activated_rows_of_new_experts() -> None:
    saved_rows = 6 * (8 + 16) * 2
    choices = 4 * (2 * 8 - 9)  # no balance loss, but the LPR loss
    actual = memory(workload=replace(WORKLOAD, stage="stage2")).activation_bytes
    assert actual == memory().activation_bytes - 2 * (saved_rows + choices)


def test_a_pipeline_stage_keeps_the_micro_batches_in_flight() -> None:
    layout = PlannedLayout(pp=2)
    assert [memory(layout, pp_rank=rank).activation_bytes for rank in (0, 1)] == [2 * FIRST, SECOND + HEAD]
    assert memory(layout, replace(WORKLOAD, global_batch_size=1)).activation_bytes == FIRST


def test_stage_0_needs_gradients_and_optimizer_state_of_all_rows_of_the_vocabulary() -> None:
    """Old rows get gradients too, which are then set to zero; only the padded embedding and output layer train."""
    vocabulary = 128 * 8
    rank = memory(workload=replace(WORKLOAD, stage="stage0"))
    assert (rank.gradient_bytes, rank.optimizer_bytes) == (4 * 2 * vocabulary, 12 * 2 * vocabulary)
    assert rank.trainable + rank.frozen == FROZEN + NEW_EXPERTS + ROUTERS
    one, both = memory(), memory(workload=replace(WORKLOAD, new_embeddings=True))
    assert both.optimizer_bytes == one.optimizer_bytes + rank.optimizer_bytes
    assert both.parameter_bytes == one.parameter_bytes
    # Each end of a pipeline holds its matrix, or if tied, both hold the same one.
    for is_untied in (True, False):
        shape = SMALL_SHAPE | {"untie_embeddings_and_output_weights": is_untied}
        spec = replace(SPEC, megatron_args=shape)
        ends = stage_memories(spec, model_parts(spec), PlannedLayout(pp=2), replace(WORKLOAD, stage="stage0"))
        assert [end.gradient_bytes for end in ends] == [4 * vocabulary] * 2


ACTIVATION_SHAPE = SHAPE | dict(hidden_size=64, ffn_hidden_size=160, kv_channels=16, max_position_embeddings=128)
ACTIVATION_SHAPE["vocab_size"] = 256
SEQ_LENGTH, MICRO_BATCH_SIZE = 96, 2


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("stage", "new_embeddings", "everything"), TRAININGS)
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_bytes_kept_by_autograd_are_within_two_percent_of_the_plan(
    stage, new_embeddings, everything, recompute
) -> None:
    """In one process; tests/dry_run does it in every layout. K = E: routing has no influence."""
    moe, new_tokens = MoeSpec(num_new_experts=1, topk=2, layers=(0, 2)), NewTokens(200, 56, 230)
    spec = ModelSpec("qwen2", "float32", ACTIVATION_SHAPE, moe if stage not in DENSE_STAGES else None, new_tokens)
    lpr = {"lpr_loss_coeff": 0.1}
    losses = {"stage1": {"moe_aux_loss_coeff": 0.01}, "stage2": lpr, "sft": lpr}.get(stage, {})
    recomputed: dict[str, dict[str, object]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    built = build_model(spec, **losses, **recomputed[recompute])
    (model,) = freeze([built], stage, everything, new_embeddings, new_tokens)
    model.config.lpr_token_weight = torch.tensor(1.0)
    tokens = torch.randint(0, 256, (MICRO_BATCH_SIZE, SEQ_LENGTH))
    saved = SavedTensors()
    saved.parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        positions, language = torch.arange(SEQ_LENGTH).expand_as(tokens), torch.ones_like(tokens, dtype=torch.uint8)
        loss = model.train()(tokens, positions, attention_mask=None, labels=tokens, padding_mask=language)
        loss.sum().backward()
    sizes = SEQ_LENGTH, MICRO_BATCH_SIZE, MICRO_BATCH_SIZE
    workload = Workload(stage, *sizes, "fp32", CPU, new_embeddings, everything)
    layout = PlannedLayout(recompute=recompute, distributed_optimizer=False)
    planned = stage_memories(spec, model_parts(spec), layout, workload)[0].activation_bytes
    assert saved.peak == pytest.approx(planned, rel=0.02)
    del loss
    assert saved.live == 0, "the counter releases what autograd releases"


FOUR_LAYERS = SHAPE | {"num_layers": 4}


def spec_of(layers: tuple[int, ...] = (0, 1, 2, 3), num_original_experts: int = 1, **changes: object) -> ModelSpec:
    return ModelSpec("qwen2", "float32", FOUR_LAYERS | changes, MoeSpec(4, 2, layers, num_original_experts))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("is_untied", [False, True])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(("stage", "new_embeddings", "everything"), TRAININGS)
def test_counts_equal_those_of_a_built_model(is_untied, layers, m, stage, new_embeddings, everything) -> None:
    spec = spec_of(layers, m, untie_embeddings_and_output_weights=is_untied)
    spec = spec.as_dense() if stage in DENSE_STAGES else spec
    (model,) = freeze([build_model(spec)], stage, everything, new_embeddings, NewTokens(100, 28, 110))
    workload = Workload(stage, 64, 1, 1, new_embeddings=new_embeddings, train_everything=everything)
    rank = stage_memories(spec, model_parts(spec), PlannedLayout(), workload)[0]
    assert rank.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert rank.frozen == sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


layouts = st.builds(
    lambda tp, pp, ep, split, dp: PlannedLayout(tp, pp, ep, tp if split else 1, dp * ep),
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
def test_the_shards_of_all_ranks_add_up_to_the_full_model(spec: ModelSpec, layout: PlannedLayout) -> None:
    """Sum over all ranks, each part divided by the number of ranks with the same shard."""
    parts, ranks_of_a_stage = model_parts(spec), layout.tp * layout.dp
    actual, full = Counter[Part](), Counter[Part]()
    for pp_rank in range(layout.pp):
        for part, numel in held_on_stage(spec, parts, layout, pp_rank).items():
            copies = ranks_of_a_stage // divisor(part, layout)
            actual[part] += ranks_of_a_stage * numel // copies
    for (_, part), numel in parts.items():
        full[part] += numel
    padded = padded_vocabulary(spec.megatron_args["vocab_size"], layout.tp) * spec.megatron_args["hidden_size"]
    is_tied = not spec.megatron_args["untie_embeddings_and_output_weights"]
    full[Part.EMBEDDING] = padded * (2 if is_tied and layout.pp > 1 else 1)
    if not is_tied:
        full[Part.OUTPUT_LAYER] = padded
    assert actual == full


@given(spec=specs, layout=layouts, stage=st.sampled_from(["stage1", "stage2"]))
@settings(max_examples=100, deadline=None)
def test_the_optimizer_state_of_all_ranks_is_one_copy_per_trained_parameter(spec, layout, stage) -> None:
    """12 bytes each in bf16; a router once per tensor-parallel rank, as TP does not divide it; shards round up."""
    parts = model_parts(spec)
    workload = Workload(stage, 64, 1, layout.dp)
    total = layout.tp * layout.dp * sum(rank.optimizer_bytes for rank in stage_memories(spec, parts, layout, workload))
    routers = sum(numel for (_, part), numel in parts.items() if part is Part.ROUTER)
    new_experts = sum(numel for (_, part), numel in parts.items() if part is Part.NEW_EXPERTS)
    exact = 12 * (layout.tp * routers + (new_experts if stage == "stage1" else 0))
    assert exact <= total <= exact + 12 * 2 * layout.world_size
