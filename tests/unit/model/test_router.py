"""The router trains with the LPR loss only if it knows the tokens' languages."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from moelpr.model import router as module
from moelpr.model.loading import build_model, transformer_config
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


def test_a_run_without_the_lpr_loss_has_no_graph_of_it(moe_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is logged all the same."""
    sums, loss = [], module.lpr_loss
    monkeypatch.setattr(module, "lpr_loss", lambda *args, **options: sums.append(loss(*args, **options)) or sums[-1])
    for coeff in (0.0, 0.1):
        module.LPRLossNormalizer.weight = torch.tensor(1.0)
        router = build_model(moe_spec, lpr_loss_coeff=coeff).decoder.layers[0].mlp.router.train()
        router(torch.randn(4, 2, 32), torch.ones(4, 2, dtype=torch.bool))
        assert sums[-1].requires_grad == (coeff > 0) and router.routing_sums[0] == sums[-1] > 0


def test_pipeline_stages_do_not_wait_for_the_gpu_after_an_exchange(moe_spec: ModelSpec) -> None:
    assert TransformerConfig.batch_p2p_sync, "Megatron has stopped to wait: remove the setting"
    assert not transformer_config(moe_spec).batch_p2p_sync


def test_scores_of_bf16_hidden_states_are_computed_in_fp32(moe_spec: ModelSpec) -> None:
    router = build_model(moe_spec, bf16=True, params_dtype=torch.bfloat16).decoder.layers[0].mlp.router
    hidden = torch.randn(4, 2, 32, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    logits = router.gating(hidden)
    torch.testing.assert_close(logits, hidden.float() @ router.weight.float().T, rtol=1e-5, atol=1e-6)
    assert (logits != logits.bfloat16()).any()
