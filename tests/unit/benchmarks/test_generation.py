"""The export's stand-ins choose the experts whose cost is measured."""

from argparse import Namespace

import pytest
import torch

from benchmarks import generation
from benchmarks.timing import Turns

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


def test_both_cases_compare_every_model_with_the_base() -> None:
    cases = dict(generation.run(Turns(1), SETTINGS))
    assert [*cases] == ["reading 8 tokens", "writing 2 tokens"]
    for times in cases.values():
        assert next(iter(times)) == "base" and len(times) == 5
        assert all(seconds[0] > 0 for seconds in times.values())
