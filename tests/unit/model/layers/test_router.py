from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from moelpr.model.layers.loading import build_model, transformer_config
from moelpr.model.layers.router import Decisions
from moelpr.model.metrics.routing_sums import RoutingSums
from moelpr.model.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")


def test_losing_the_language_bits_is_an_error_if_they_are_needed(moe_spec: ModelSpec) -> None:
    router = build_model(moe_spec, lpr_loss_coeff=0.1).decoder.layers[0].mlp.router
    hidden = torch.randn(4, 2, 32)
    with pytest.raises(AssertionError, match="language bits"):
        router.train()(hidden)
    assert router.eval()(hidden)[0].shape == (8, 5)
    without_loss = build_model(moe_spec).decoder.layers[0].mlp.router
    assert without_loss.train()(hidden)[0].shape == (8, 5)


class Launches(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_statistics_of_all_routers_are_summed_at_once(moe_spec: ModelSpec, variant: str) -> None:
    """With the sums of each alone, in no more operations for more layers; also if a micro-batch was incomplete."""
    routers = [layer.mlp.router.train() for layer in build_model(moe_spec, lpr_loss=variant).decoder.layers]
    batches = [(torch.randn(6, 2, 32), torch.rand(6, 2) < 0.5) for _ in range(3)]
    passes = [[0, 1, 2], [2, 0], [0, 1, 2]]
    actual, launches = [], []
    for shares in (False, True):
        shared = Decisions(len(routers))
        for router in routers:
            router.routing_sums, router.decisions = None, shared if shares else Decisions(1)
        with Launches() as counted:
            for (hidden, bits), order in zip(batches, passes, strict=True):
                for number in order:
                    routers[number](hidden, bits.to(torch.uint8))
            shared.add_up()
        actual.append([router.routing_sums for router in routers])
        launches.append(counted.number)
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-6, atol=1e-6)
    assert launches[0] - launches[1] > 20 * (8 - 4)  # eight passes, summed in four groups


def test_statistics_count_what_tokens_could_choose(moe_spec: ModelSpec) -> None:
    """With original experts left out, their scores and first choices are 0; the LPR loss is that of the scores."""
    router = build_model(moe_spec, stage1_experts="new").decoder.layers[0].mlp.router.train()
    hidden, bits = torch.randn(6, 2, 32), torch.ones(6, 2, dtype=torch.bool)
    router(hidden, bits)
    sums = RoutingSums.from_vectors(router.routing_sums.unsqueeze(0))
    assert sums.original_first.sum() == sums.choices[0, 0] == sums.scores[0, 0] == 0
    assert sums.scores.sum() == pytest.approx(12) and sums.choices.sum() == 24
    scores = torch.softmax(hidden.flatten(0, 1) @ router.weight.T, dim=-1)
    assert sums.lpr_loss.item() == pytest.approx(-scores[:, 0].log().sum().item(), rel=1e-5)


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
