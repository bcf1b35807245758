"""The export's stand-ins choose the experts whose cost is measured."""

from argparse import Namespace

import pytest
import torch

from benchmarks import generation

SETTINGS = Namespace(layers=1, hidden=72, ffn=24, prompt=8, written=2)


@pytest.mark.parametrize("topk", [2, 3])
def test_tokens_take_original_experts_only_or_all(topk: int) -> None:
    tokens = torch.arange(8).unsqueeze(0)
    for only_original in (True, False):
        model = generation._model(SETTINGS, topk, only_original)
        before = model(tokens).logits
        for weight in model.model.layers[0].mlp.experts.parameters():
            weight.data[topk:] += 1
        assert torch.equal(model(tokens).logits, before) == only_original
