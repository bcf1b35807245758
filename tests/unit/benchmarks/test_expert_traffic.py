"""The byte counter and the imposed routing, on cases worked out by hand."""

import pytest
import torch

from benchmarks.expert_traffic import Traffic, bytes_to_others, chosen_experts, counted_traffic, impose, peer_experts


def test_rows_for_the_own_rank_do_not_count() -> None:
    rows = torch.zeros(10, 3)  # 12 bytes a row
    assert bytes_to_others(rows, [2, 5, 3], own_rank=1, num_ranks=3) == 5 * 12
    assert bytes_to_others(rows, None, own_rank=0, num_ranks=5) == 8 * 12  # equal shares of 2 rows
    assert bytes_to_others(rows[:, 0].bfloat16(), [4, 6], own_rank=0, num_ranks=2) == 6 * 2
    assert bytes_to_others(rows[:0], [0, 0], own_rank=0, num_ranks=2) == 0


def test_the_counter_separates_forward_from_backward_and_finds_the_busiest_direction(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with counted_traffic() as traffic:
        torch.distributed.all_to_all_single(torch.zeros(7, 2), torch.zeros(4, 2), [3, 4], [3, 1], group=None)
        traffic.phase = "backward"
        torch.distributed.all_to_all_single(torch.zeros(4, 2), torch.zeros(7, 2), [3, 1], [3, 4], group=None)
    assert traffic == Traffic([("forward", 1 * 8, 4 * 8), ("backward", 4 * 8, 1 * 8)], phase="backward")
    assert (traffic.sent("forward"), traffic.sent("backward")) == (8, 32)
    assert traffic.busier_directions() == [32, 32]
    torch.distributed.all_to_all_single(torch.zeros(1, 2), torch.zeros(1, 2), [0, 1], [0, 1], group=None)
    assert len(traffic.calls) == 2 and len(calls) == 3, "the counter is gone, the calls went through"


@pytest.mark.parametrize("pattern", ["uniform", "reviewed"])
def test_a_router_with_identity_weights_chooses_what_it_is_told(pattern: str) -> None:
    choices = chosen_experts(pattern, 64, 9, 2, torch.Generator().manual_seed(0))
    hidden = impose(torch.randn(64, 16), choices, 9)
    assert torch.equal(torch.topk(hidden @ torch.eye(9, 16).T, 2).indices, choices)
    assert (choices[:, 0] != choices[:, 1]).all()
    firsts = (choices[:32, 0] == 0).float().mean()
    assert firsts == 1 if pattern == "reviewed" else firsts < 0.5


@pytest.mark.parametrize(("new", "ep", "experts"), [(8, 2, 8), (8, 4, 8), (7, 4, 8), (3, 4, 4), (10, 4, 12)])
def test_the_peer_has_the_nearest_number_of_experts_that_divides(new: int, ep: int, experts: int) -> None:
    assert peer_experts(new, ep) == experts
