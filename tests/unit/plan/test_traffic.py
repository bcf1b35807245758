"""Expert traffic, on an example small enough to work out by hand."""

from dataclasses import replace

import pytest

from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import Routing
from moelpr.plan.traffic import expert_traffic
from tests.unit.plan.conftest import ROUTING, SPEC, WORKLOAD


def test_expert_traffic_by_hand() -> None:
    """3 of 6 rows leave the rank, out (16 + 4 bytes) and back (16), forward and backward, 2 layers, 2 micro-batches."""
    layout = PlannedLayout(ep=2, dp=2)
    assert expert_traffic(SPEC, layout, WORKLOAD, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 2 * 2 * 2
    recomputed = replace(layout, recompute="full")
    assert expert_traffic(SPEC, recomputed, WORKLOAD, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 3 * 2 * 2
    assert expert_traffic(SPEC, layout, WORKLOAD, ROUTING).expert_tensor == 0


def test_expert_tensor_parallel_ranks_gather_new_rows_and_every_token() -> None:
    """2 tokens per rank: it receives the other rank's 3 rows and 2 tokens; 4 micro-batches, 2 layers."""
    traffic = expert_traffic(SPEC, PlannedLayout(tp=2, etp=2), WORKLOAD, ROUTING)
    assert traffic.expert_tensor == (3 + 2) * (16 + 4 + 16) * 2 * 2 * 4
    assert traffic.all_to_all == 0
    spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=3))
    more_weights = 2 * 2 * 4  # two tokens, two more original experts
    gathered = (expert_traffic(spec, PlannedLayout(tp=2, etp=2), WORKLOAD, ROUTING), traffic)
    assert gathered[0].expert_tensor - gathered[1].expert_tensor == more_weights * 2 * 2 * 4


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_rows_of_the_original_expert_never_leave_the_rank(fraction: float) -> None:
    all_new = expert_traffic(SPEC, PlannedLayout(ep=2, dp=2), WORKLOAD, Routing(0, 2)).all_to_all
    some = expert_traffic(
        SPEC, PlannedLayout(ep=2, dp=2), WORKLOAD, Routing(2 * fraction, 2 * (1 - fraction))
    ).all_to_all
    assert some == all_new * (1 - fraction)
