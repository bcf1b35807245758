"""The imposed routing and the peer's number of experts, on cases worked out by hand."""

import pytest
import torch

from benchmarks.expert_traffic import chosen_experts, impose, peer_experts


@pytest.mark.parametrize("pattern", ["uniform", "reviewed"])
def test_a_router_with_identity_weights_makes_the_imposed_choices(pattern: str) -> None:
    choices = chosen_experts(pattern, 64, 9, 2, torch.Generator().manual_seed(0))
    hidden = impose(torch.randn(64, 16), choices, 9)
    assert torch.equal(torch.topk(hidden @ torch.eye(9, 16).T, 2).indices, choices)
    assert (choices[:, 0] != choices[:, 1]).all()
    firsts = (choices[:32, 0] == 0).float().mean()
    assert firsts == 1 if pattern == "reviewed" else firsts < 0.5


@pytest.mark.parametrize(("new", "ep", "experts"), [(8, 2, 8), (8, 4, 8), (7, 4, 8), (3, 4, 4), (10, 4, 12)])
def test_the_peer_has_the_nearest_number_of_experts_that_ep_divides(new: int, ep: int, experts: int) -> None:
    assert peer_experts(new, ep) == experts
