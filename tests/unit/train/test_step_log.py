import math
from types import SimpleNamespace

import pytest
import torch

from moelpr.base import ranks
from moelpr.model.megatron import cpu
from moelpr.model.metrics.routing_sums import routing_vectors
from moelpr.train.step_log import MetricsTracker, _of_ranks, slowest_node


def test_layers_whose_scores_are_nan_stay_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, of which the first is dense; the activations overflow in the last one."""
    cpu.install()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    tracker = MetricsTracker()
    tracker.num_places = 2
    is_original, is_chosen = torch.tensor([True, False]), torch.tensor([[True, False], [False, True]])
    for layer_number, scale in ((2, 1.0), (3, math.nan)):
        logits = scale * torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        each = (logits, is_chosen, torch.tensor(0.0), is_original)
        (sums,) = routing_vectors(*(tensor.unsqueeze(0) for tensor in each), num_original_places=1)
        tracker.routers.append(SimpleNamespace(layer_number=layer_number, routing_sums=sums))
    actual = tracker.reduce_routing(num_layers=3)
    assert actual.token_shares().tolist() == [[0.5, 0.5]] * 2
    assert actual.router_scores().isnan().any(dim=1).tolist() == [False, True]


def test_the_slowest_node_is_that_of_its_pipeline_stage() -> None:
    """Two stages of two nodes of two ranks; the second stage takes longer, and one node of the first is slow."""
    times = torch.tensor([1.0, 1.0, 1.5, 1.5, 3.0, 3.1, 3.0, 3.1])
    assert slowest_node(times, pipeline_stages=2, ranks_per_node=2) == (1, 1.5)


def test_each_rank_gets_the_highest_memory_and_the_times_of_all(monkeypatch) -> None:
    def all_reduce(tensor: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MAX and tensor[2] == 0
        tensor[2], tensor[0] = 7.0, 99.0

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    memory, times = _of_ranks(5.0)
    assert memory == 99.0 and times.tolist() == [5.0, 7.0]
