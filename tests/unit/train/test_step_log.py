import math
from types import SimpleNamespace

import pytest
import torch

from moelpr.model.megatron import cpu
from moelpr.model.metrics.routing_sums import routing_vectors
from moelpr.train.step_log import MetricsTracker


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
