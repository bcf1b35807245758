"""Transformer Engine's permutation (a stand-in with its refusals) gives the same output, also without rows to send."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moelpr.model.megatron import bootstrap
from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.fake_gpu import transformer_engine_stub as te
from tests.unit.conftest import SHAPE

HIDDEN = SHAPE["hidden_size"]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    bootstrap.install_patches()
    from megatron.core.transformer.moe import moe_utils

    from moelpr.model.layers.loading import build_model
    from moelpr.model.megatron.bootstrap import single_process

    for name in "permute permute_with_probs unpermute sort_chunks_by_index sort_chunks_by_index_with_probs".split():
        monkeypatch.setattr(moe_utils, f"fused_{name}", getattr(te, f"moe_{name}"))
    monkeypatch.setattr(moe_utils, "HAVE_TE", True)

    def layer(fused: bool) -> torch.nn.Module:
        spec = ModelSpec("qwen2", "float32", SHAPE, MoeSpec(4, 2, (0, 1), num_original_experts=2))
        return build_model(spec, moe_permute_fusion=fused).decoder.layers[0].mlp

    with single_process():
        yield layer


@pytest.mark.parametrize("only_original", [False, True])
def test_the_output_is_that_of_torchs_permutation(build: Any, only_original: bool) -> None:
    hidden = torch.randn(5, 3, HIDDEN)
    fused, plain, outputs = build(True), build(False), []
    plain.load_state_dict(fused.state_dict())
    for layer in (fused, plain):
        if only_original:
            hidden[..., 0] = 1.0
            with torch.no_grad():
                layer.router.weight[:2, 0] = 100.0
        rows = hidden.clone().requires_grad_()
        output, _ = layer(rows)
        output.square().sum().backward()
        outputs.append((output, rows.grad, layer.experts.linear_fc1.weight.grad))
    assert only_original == (not outputs[0][2].any()) == (not fused.token_dispatcher.config.moe_permute_fusion)
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
