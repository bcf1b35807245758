"""The router trains with the LPR loss only if it knows the tokens' languages."""

import pytest
import torch

from moelpr.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")


def test_losing_the_language_bits_is_an_error_if_they_are_needed(moe_spec: ModelSpec) -> None:
    from moelpr.model.loading import build_model

    router = build_model(moe_spec, lpr_loss_coeff=0.1).decoder.layers[0].mlp.router
    hidden = torch.randn(4, 2, 32)
    with pytest.raises(AssertionError, match="language bits"):
        router.train()(hidden)
    assert router.eval()(hidden)[0].shape == (8, 5)
    without_loss = build_model(moe_spec).decoder.layers[0].mlp.router
    assert without_loss.train()(hidden)[0].shape == (8, 5)
