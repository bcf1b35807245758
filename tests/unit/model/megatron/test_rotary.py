import inspect

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from moelpr.model.megatron import bootstrap


@pytest.fixture
def rotate():
    bootstrap.install_patches()
    return rope_utils._apply_rotary_pos_emb_bshd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("channels", [8, 4], ids=["all channels turn", "half of them"])
def test_the_result_and_its_gradient_are_megatrons(rotate, dtype, interleaved: bool, channels: int) -> None:
    freqs, heads = torch.randn(5, 1, 1, channels), torch.randn(5, 2, 3, 8).to(dtype)
    actual = []
    for function in (inspect.unwrap(rotate), rotate):
        given = heads.clone().requires_grad_()
        output = function(given, freqs, rotary_interleaved=interleaved, mscale=0.5)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype))
        actual.append((output, given.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*actual, strict=True))


def test_cos_is_computed_once_for_all_layers_and_again_after_inference(rotate, monkeypatch) -> None:
    calls, cos = [], torch.cos
    monkeypatch.setattr(torch, "cos", lambda freqs: (calls.append(freqs), cos(freqs))[1])
    freqs, heads = torch.randn(5, 1, 1, 8), torch.randn(5, 2, 3, 8)
    with torch.inference_mode():
        rotate(heads, freqs)
    for _ in range(4):
        rotate(heads.clone().requires_grad_(), freqs).sum().backward()
    assert len(calls) == 2
    rotate(heads, freqs, mscale=0.5)
    assert len(calls) == 3
