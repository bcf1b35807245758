"""The rule of thumb that picks the recommended layout."""

from dataclasses import replace

import pytest

from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.plan.layouts import Layout
from moelpr.plan.memory import Run
from moelpr.plan.model import model_parts
from moelpr.plan.ranking import bubble, preference, relative_time

SHAPE = {
    "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1,
    "kv_channels": 4, "untie_embeddings_and_output_weights": True, "vocab_size": 100,
}  # fmt: skip
SPEC = ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(num_new_experts=3, topk=2, layers=(0, 1)))
PARTS = model_parts(SPEC)
RUN = Run("stage1", seq_length=4, micro_batch_size=1, global_batch_size=16)
EXPERT = 3 * 8 * 16
ATTENTION = 16 * 8 + 16 + 8 * 8


def test_recompute_costs_the_part_of_the_forward_pass_that_it_repeats() -> None:
    experts, others, output = 2 * 2 * EXPERT, 2 * ATTENTION, 100 * 8
    once = 2 * (experts + others + output) + experts * 3 / 4
    assert relative_time(SPEC, PARTS, Layout(), RUN) == 1
    selective = relative_time(SPEC, PARTS, Layout(recompute="selective"), RUN)
    assert selective == pytest.approx(1 + experts / once)
    assert relative_time(SPEC, PARTS, Layout(recompute="full"), RUN) == pytest.approx(1 + (experts + others) / once)
    in_stage2 = relative_time(SPEC, PARTS, Layout(recompute="selective"), replace(RUN, stage="stage2"))
    assert in_stage2 == pytest.approx(1 + experts / (2 * (experts + others + output)))


def test_a_token_passes_k_experts_however_many_there_are() -> None:
    """A second original expert takes rows from the new ones, whose weights' gradients are then less work."""
    spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=2))
    experts, others, output = 2 * 2 * EXPERT, 2 * ATTENTION, 100 * 8
    once = 2 * (experts + others + output) + experts * 3 / 5
    selective = relative_time(spec, model_parts(spec), Layout(recompute="selective"), RUN)
    assert selective == pytest.approx(1 + experts / once)


def test_a_pipeline_waits_for_its_first_and_last_micro_batch() -> None:
    assert bubble(Layout(pp=4), num_microbatches=12) == pytest.approx(3 / 15)
    assert relative_time(SPEC, PARTS, Layout(pp=2), RUN) == pytest.approx(17 / 16)


def test_time_decides_in_twentieths_and_then_communication() -> None:
    def key(layout: Layout, time: float, traffic: float = 0) -> tuple[float, ...]:
        return preference(layout, time, gpus_per_node=8, traffic_bytes=traffic)

    in_order = [
        key(Layout(dp=8), 1.0),
        key(Layout(ep=2, dp=8), 1.0, traffic=100),
        key(Layout(pp=2, dp=4), 1.02),
        key(Layout(tp=2, dp=4), 1.0),
        key(Layout(tp=4, dp=2), 1.0),
        key(Layout(ep=3, dp=24), 1.0),  # groups of 3 reach over nodes of 8
        key(Layout(pp=2, dp=4), 1.1),
        key(Layout(recompute="full", dp=8), 1.3),
    ]
    assert sorted(reversed(in_order)) == in_order
