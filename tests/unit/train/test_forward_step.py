import pytest
import torch
from megatron.core import num_microbatches_calculator as calculator

from moelpr.data.batch import BatchReader
from moelpr.model.layers.loading import build_model
from moelpr.model.metrics.routing_sums import RoutingSums
from moelpr.model.model_spec import ModelSpec
from moelpr.train.forward_step import ForwardClock, forward_step, stragglers

pytestmark = pytest.mark.usefixtures("megatron")

MICROBATCHES = 2


@pytest.fixture
def two_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)  # another test's
    calculator.init_num_microbatches_calculator(0, None, 2 * MICROBATCHES, 2, 1)


@pytest.mark.usefixtures("two_micro_batches")
def test_the_lpr_loss_is_of_the_input_tokens_of_the_whole_batch(moe_spec: ModelSpec, monkeypatch) -> None:
    """Every token's bit differs from its label's. Megatron's timers of stragglers see each micro-batch."""
    torch.manual_seed(0)
    model = build_model(moe_spec, lpr_loss_coeff=0.1).train()
    routers = [layer.mlp.router for layer in model.decoder.layers]
    logits: list[list[torch.Tensor]] = [[] for _ in routers]
    for router, found in zip(routers, logits, strict=True):
        torch.nn.init.normal_(router.weight)
        router.gating = lambda hidden, gating=router.gating, found=found: found.append(gating(hidden)) or found[-1]
    is_original = torch.rand(MICROBATCHES, 2, 16) < 0.3
    tokens = torch.randint(0, 128, (MICROBATCHES, 2, 17))
    common = {"loss_mask": torch.ones(2, 16), "position_ids": torch.arange(16).expand(2, 16)}
    batches = [
        common | {"tokens": ids[:, :-1], "labels": ids[:, 1:], "is_original": bits, "is_original_label": ~bits}
        for ids, bits in zip(tokens, is_original, strict=True)
    ]
    reader = BatchReader()
    reader.read(model, iter(batches), MICROBATCHES, tuple(batches[0]["tokens"].shape))
    timed: list[bool] = []
    monkeypatch.setattr(stragglers, "start", lambda: timed.append(stragglers.bdata) or stragglers(bdata=False))
    for number, _ in enumerate(batches, 1):
        forward_step(reader, ForwardClock(), None, model)
        assert timed == [True, False] * number
        assert model.config.lpr_token_weight.item() == pytest.approx(MICROBATCHES / is_original.sum().item())
    for router, of_batches in zip(routers, logits, strict=True):
        sums = RoutingSums.from_vectors(router.routing_sums[None])
        scores = torch.stack([torch.softmax(found.transpose(0, 1), dim=-1) for found in of_batches])
        torch.testing.assert_close(sums.lpr_loss[0], -scores[is_original][:, 0].log().sum())
        torch.testing.assert_close(sums.scores[0], scores.sum(dim=(0, 1, 2)))
        assert sums.tokens[0].tolist() == [is_original.sum().item(), (~is_original).sum().item()]
