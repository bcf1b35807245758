"""The router trains with the LPR loss only if it knows the tokens' languages."""

import pytest
import torch

from moelpr.model.loading import build_model
from moelpr.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")


def test_losing_the_language_bits_is_an_error_if_they_are_needed(moe_spec: ModelSpec) -> None:
    router = build_model(moe_spec, lpr_loss_coeff=0.1).decoder.layers[0].mlp.router
    hidden = torch.randn(4, 2, 32)
    with pytest.raises(AssertionError, match="language bits"):
        router.train()(hidden)
    assert router.eval()(hidden)[0].shape == (8, 5)
    without_loss = build_model(moe_spec).decoder.layers[0].mlp.router
    assert without_loss.train()(hidden)[0].shape == (8, 5)


def test_scores_of_bf16_hidden_states_are_computed_in_fp32(moe_spec: ModelSpec) -> None:
    router = build_model(moe_spec, bf16=True, params_dtype=torch.bfloat16).decoder.layers[0].mlp.router
    hidden = torch.randn(4, 2, 32, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    logits = router.gating(hidden)
    torch.testing.assert_close(logits, hidden.float() @ router.weight.float().T, rtol=1e-5, atol=1e-6)
    assert (logits != logits.bfloat16()).any()
