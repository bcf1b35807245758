"""The rule on an example small enough to work out by hand."""

from dataclasses import replace

import pytest

from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.plan.layouts import Layout
from moelpr.plan.memory import CPU, Kernels, Routing, Run, stage_memories
from moelpr.plan.model import model_parts
from moelpr.plan.traffic import expert_traffic

SHAPE = {
    "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1,
    "group_query_attention": True, "kv_channels": 4, "max_position_embeddings": 64, "position_embedding_type": "rope",
    "rotary_base": 10000, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "swiglu": True, "add_bias_linear": False,
    "add_qkv_bias": True, "qk_layernorm": False, "untie_embeddings_and_output_weights": True, "vocab_size": 100,
}  # fmt: skip
SPEC = ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(num_new_experts=2, topk=2, layers=(0, 1)))
PARTS = model_parts(SPEC)
ALONE = Layout(distributed_optimizer=False)
# 4 tokens in a micro-batch, 4 micro-batches; a token's two rows: half a row original, one and a half new.
RUN = Run("stage1", seq_length=4, micro_batch_size=1, global_batch_size=4, kernels=Kernels(norm_output=False))
ROUTING = Routing(original_rows=0.5, new_rows=1.5)

NEW_EXPERTS = 2 * 2 * 3 * 8 * 16  # layers · N · (gate, up, down)
ROUTERS = 2 * 3 * 8
ATTENTION = 16 * 8 + 16 + 8 * 8
FROZEN = 2 * (3 * 8 * 16 + ATTENTION + 2 * 8) + 8 + 2 * 128 * 8  # the vocabulary of 100 is padded to 128

MOE_INSIDE = 4 * (2 * 12 + 3 * 4 + 2 * 8 + 2 * 8) + 2 * ((2 * 16 + 8) * 2 + 12) + 6 * ((3 * 16 + 8) * 2 + 12)
MOE_INPUT = 4 * 8 * 2
NORM = 4 * (8 * 2 + 4)
ATTENTION_KEPT = (4 * (16 + 12 + 8) + 4 * 4 * 4) * 2 + 4 * 2 * 4
HEAD = NORM + 4 * (128 * 4 + 1 + 8 + 4 * 4)


def memory(layout: Layout = ALONE, run: Run = RUN, pp_rank: int = 0):
    return stage_memories(SPEC, PARTS, layout, run, ROUTING)[pp_rank]


def test_stage1_trains_new_experts_and_routers_at_18_bytes_and_holds_the_rest_at_2() -> None:
    rank = memory()
    assert (rank.trainable, rank.frozen) == (NEW_EXPERTS + ROUTERS, FROZEN)
    assert rank.parameter_bytes == 2 * (NEW_EXPERTS + ROUTERS + FROZEN)
    assert rank.gradient_bytes == 4 * (NEW_EXPERTS + ROUTERS)
    assert rank.optimizer_bytes == 12 * (NEW_EXPERTS + ROUTERS)


def test_fp32_needs_no_masters() -> None:
    rank = memory(run=replace(RUN, dtype="fp32"))
    assert rank.parameter_bytes == 4 * (NEW_EXPERTS + ROUTERS + FROZEN)
    assert rank.gradient_bytes == 4 * (NEW_EXPERTS + ROUTERS)
    assert rank.optimizer_bytes == 8 * (NEW_EXPERTS + ROUTERS)


def test_stage2_has_state_of_routers_only() -> None:
    rank = memory(run=replace(RUN, stage="stage2"))
    assert rank.gradient_bytes == 4 * ROUTERS
    assert rank.optimizer_bytes == 12 * ROUTERS


def test_a_second_original_expert_costs_its_weights_and_a_router_row_and_nothing_trains_in_it() -> None:
    """On every expert-parallel rank 2 bytes per parameter; over expert-tensor-parallel ranks it is divided."""
    spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=2))
    parts, expert = model_parts(spec), 2 * 3 * 8 * 16  # layers · (gate, up, down)
    spread = Layout(ep=2, dp=2, distributed_optimizer=False)
    for layout in (ALONE, spread):
        one, two = memory(layout), stage_memories(spec, parts, layout, RUN, ROUTING)[0]
        assert two.frozen == one.frozen + expert
        assert two.trainable == one.trainable + 2 * 8
        assert two.parameter_bytes == one.parameter_bytes + 2 * (expert + 2 * 8)
        assert two.gradient_bytes == one.gradient_bytes + 4 * 2 * 8
        assert two.optimizer_bytes == one.optimizer_bytes + 12 * 2 * 8
    split = Layout(tp=2, etp=2)
    one, two = memory(split), stage_memories(spec, parts, split, RUN, ROUTING)[0]
    assert two.frozen == one.frozen + expert // 2


def test_all_experts_get_equally_many_rows_unless_told_otherwise() -> None:
    moe = MoeSpec(num_new_experts=3, topk=2, layers=(0,), num_original_experts=2)
    assert Routing.uniform(moe) == Routing(original_rows=0.8, new_rows=1.2)


def test_the_distributed_optimizer_divides_over_the_ranks_that_hold_the_same() -> None:
    """Four ranks, EP 2: a new expert is on two of them, a router on all four."""
    rank = memory(Layout(ep=2, dp=4))
    assert rank.optimizer_bytes == 12 * (NEW_EXPERTS // 2 // 2 + ROUTERS // 4)
    whole = memory(Layout(ep=2, dp=4, distributed_optimizer=False))
    assert whole.optimizer_bytes == 12 * (NEW_EXPERTS // 2 + ROUTERS)


def test_activations_by_hand() -> None:
    """Below the first router nothing needs a gradient: the first layer keeps no norms and no attention."""
    first = MOE_INPUT + MOE_INSIDE
    second = 2 * NORM + ATTENTION_KEPT + MOE_INPUT + MOE_INSIDE
    assert memory().activation_bytes == first + second + HEAD == 5364


def test_stage2_keeps_neither_input_nor_activated_rows_of_new_experts() -> None:
    saved_rows = 6 * (8 + 16) * 2
    choices = 4 * (2 * 8 - 9)  # no balance loss, but the LPR loss
    found = memory(run=replace(RUN, stage="stage2")).activation_bytes
    assert found == memory().activation_bytes - 2 * (saved_rows + choices)


def test_recompute_keeps_inputs_and_the_inside_of_one_layer() -> None:
    outside = 2 * NORM + ATTENTION_KEPT + MOE_INPUT
    selective = memory(replace(ALONE, recompute="selective")).activation_bytes
    assert selective == 2 * outside + max(HEAD, MOE_INSIDE)
    full = memory(replace(ALONE, recompute="full")).activation_bytes
    shared = MOE_INPUT  # of the same size as the layer's input, which the first norm keeps as well
    assert full == 2 * 4 * 8 * 2 + max(HEAD, outside + MOE_INSIDE - shared)
    # The first of two stages has no head, and inputs of two micro-batches.
    assert memory(Layout(pp=2, recompute="selective")).activation_bytes == 2 * outside + MOE_INSIDE
    assert memory(Layout(pp=2, recompute="full")).activation_bytes == 2 * 4 * 8 * 2 + outside + MOE_INSIDE - shared


def test_a_pipeline_stage_keeps_the_micro_batches_in_flight() -> None:
    layout = Layout(pp=2)
    first = MOE_INPUT + MOE_INSIDE
    second = 2 * NORM + ATTENTION_KEPT + MOE_INPUT + MOE_INSIDE
    assert memory(layout, pp_rank=0).activation_bytes == 2 * first
    assert memory(layout, pp_rank=1).activation_bytes == second + HEAD
    one_micro_batch = replace(RUN, global_batch_size=1)
    assert memory(layout, one_micro_batch, pp_rank=0).activation_bytes == first


def test_what_transformer_engine_may_keep_is_counted_unless_the_kernels_say_otherwise() -> None:
    assert memory(run=replace(RUN, kernels=Kernels())).activation_bytes == memory().activation_bytes + MOE_INPUT
    assert memory(run=replace(RUN, kernels=CPU)).activation_bytes > memory().activation_bytes


def test_expert_traffic_by_hand() -> None:
    """Of 6 rows 3 leave the rank, out (16 + 4 bytes) and back (16), forward and backward, 2 layers, 2 micro-batches."""
    layout = Layout(ep=2, dp=2)
    assert expert_traffic(SPEC, layout, RUN, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 2 * 2 * 2
    recomputed = replace(layout, recompute="full")
    assert expert_traffic(SPEC, recomputed, RUN, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 3 * 2 * 2
    assert expert_traffic(SPEC, layout, RUN, ROUTING).expert_tensor == 0


def test_expert_tensor_parallel_ranks_gather_new_rows_and_every_token() -> None:
    """2 tokens per rank: the other rank's 3 rows and 2 tokens come, 4 micro-batches, 2 layers."""
    traffic = expert_traffic(SPEC, Layout(tp=2, etp=2), RUN, ROUTING)
    assert traffic.expert_tensor == (3 + 2) * (16 + 4 + 16) * 2 * 2 * 4
    assert traffic.all_to_all == 0
    spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=3))
    more_weights = 2 * 2 * 4  # of two tokens, for two more original experts
    gathered = (expert_traffic(spec, Layout(tp=2, etp=2), RUN, ROUTING), traffic)
    assert gathered[0].expert_tensor - gathered[1].expert_tensor == more_weights * 2 * 2 * 4


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_rows_of_the_original_expert_never_travel(share: float) -> None:
    all_new = expert_traffic(SPEC, Layout(ep=2, dp=2), RUN, Routing(0, 2)).all_to_all
    some = expert_traffic(SPEC, Layout(ep=2, dp=2), RUN, Routing(2 * share, 2 * (1 - share))).all_to_all
    assert some == all_new * (1 - share)
