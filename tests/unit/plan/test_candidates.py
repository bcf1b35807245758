"""Expert traffic, on an example small enough to work out by hand, and the rule of thumb that picks a layout."""

from dataclasses import replace

import pytest

from moelpr.model_spec import MoeSpec
from moelpr.plan.candidates import bubble, expert_traffic, preference, relative_time
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import Routing, Workload, model_parts
from tests.unit.plan.conftest import ROUTING
from tests.unit.plan.conftest import SPEC as SMALL_SPEC
from tests.unit.plan.conftest import WORKLOAD as SMALL_WORKLOAD

SPEC = replace(SMALL_SPEC, moe=MoeSpec(num_new_experts=3, topk=2, layers=(0, 1)))
PARTS = model_parts(SPEC)
WORKLOAD = Workload("stage1", seq_length=4, micro_batch_size=1, global_batch_size=16)
EXPERT = 3 * 8 * 16
ATTENTION = 16 * 8 + 16 + 8 * 8


def test_recompute_costs_the_fraction_of_the_forward_pass_that_it_repeats() -> None:
    experts, others, output = 2 * 2 * EXPERT, 2 * ATTENTION, 100 * 8
    once = 2 * (experts + others + output) + experts * 3 / 4
    assert relative_time(SPEC, PARTS, PlannedLayout(), WORKLOAD) == 1
    selective = relative_time(SPEC, PARTS, PlannedLayout(recompute="selective"), WORKLOAD)
    assert selective == pytest.approx(1 + experts / once)
    assert relative_time(SPEC, PARTS, PlannedLayout(recompute="full"), WORKLOAD) == pytest.approx(
        1 + (experts + others) / once
    )
    in_stage2 = relative_time(SPEC, PARTS, PlannedLayout(recompute="selective"), replace(WORKLOAD, stage="stage2"))
    assert in_stage2 == pytest.approx(1 + experts / (2 * (experts + others + output)))


def test_a_token_passes_through_k_experts_for_every_number_of_experts() -> None:
    """A second original expert takes rows from the new experts, whose weight gradients then cost less."""
    spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=2))
    experts, others, output = 2 * 2 * EXPERT, 2 * ATTENTION, 100 * 8
    once = 2 * (experts + others + output) + experts * 3 / 5
    selective = relative_time(spec, model_parts(spec), PlannedLayout(recompute="selective"), WORKLOAD)
    assert selective == pytest.approx(1 + experts / once)


def test_a_pipeline_waits_for_its_first_and_last_micro_batch() -> None:
    assert bubble(PlannedLayout(pp=4), num_microbatches=12) == pytest.approx(3 / 15)
    assert relative_time(SPEC, PARTS, PlannedLayout(pp=2), WORKLOAD) == pytest.approx(17 / 16)


def test_time_in_twentieths_decides_before_communication() -> None:
    def key(layout: PlannedLayout, time: float, traffic: float = 0) -> tuple[float, ...]:
        return preference(layout, time, gpus_per_node=8, traffic_bytes=traffic)

    in_order = [
        key(PlannedLayout(dp=8), 1.0),
        key(PlannedLayout(ep=2, dp=8), 1.0, traffic=100),
        key(PlannedLayout(pp=2, dp=4), 1.02),
        key(PlannedLayout(tp=2, dp=4), 1.0),
        key(PlannedLayout(tp=4, dp=2), 1.0),
        key(PlannedLayout(ep=3, dp=24), 1.0),  # groups of 3 span nodes of 8
        key(PlannedLayout(pp=2, dp=4), 1.1),
        key(PlannedLayout(recompute="full", dp=8), 1.3),
    ]
    assert sorted(reversed(in_order)) == in_order


def test_expert_traffic_by_hand() -> None:
    """3 of 6 rows leave the rank, out (16 + 4 bytes) and back (16), forward and backward, 2 layers, 2 micro-batches."""
    layout = PlannedLayout(ep=2, dp=2)
    assert expert_traffic(SMALL_SPEC, layout, SMALL_WORKLOAD, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 2 * 2 * 2
    recomputed = replace(layout, recompute="full")
    assert expert_traffic(SMALL_SPEC, recomputed, SMALL_WORKLOAD, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 3 * 2 * 2
    assert expert_traffic(SMALL_SPEC, layout, SMALL_WORKLOAD, ROUTING).expert_tensor == 0


def test_expert_tensor_parallel_ranks_gather_new_rows_and_every_token() -> None:
    """2 tokens per rank: it receives the other rank's 3 rows and 2 tokens; 4 micro-batches, 2 layers."""
    traffic = expert_traffic(SMALL_SPEC, PlannedLayout(tp=2, etp=2), SMALL_WORKLOAD, ROUTING)
    assert traffic.expert_tensor == (3 + 2) * (16 + 4 + 16) * 2 * 2 * 4
    assert traffic.all_to_all == 0
    spec = replace(SMALL_SPEC, moe=replace(SMALL_SPEC.moe, num_original_experts=3))
    more_weights = 2 * 2 * 4  # two tokens, two more original experts
    gathered = (expert_traffic(spec, PlannedLayout(tp=2, etp=2), SMALL_WORKLOAD, ROUTING), traffic)
    assert gathered[0].expert_tensor - gathered[1].expert_tensor == more_weights * 2 * 2 * 4


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_rows_of_the_original_expert_never_leave_the_rank(fraction: float) -> None:
    all_new = expert_traffic(SMALL_SPEC, PlannedLayout(ep=2, dp=2), SMALL_WORKLOAD, Routing(0, 2)).all_to_all
    some = expert_traffic(
        SMALL_SPEC, PlannedLayout(ep=2, dp=2), SMALL_WORKLOAD, Routing(2 * fraction, 2 * (1 - fraction))
    ).all_to_all
    assert some == all_new * (1 - fraction)
