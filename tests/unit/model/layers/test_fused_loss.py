"""The loss in chunks against Megatron's, which keeps the logits (tests/distributed compares whole runs on ranks)."""

from dataclasses import replace

import pytest
import torch

from moelpr.model.layers import fused_loss
from moelpr.model.layers.freezing import freeze
from moelpr.model.layers.fused_loss import fuse_loss
from moelpr.model.layers.loading import build_model
from moelpr.model.layers.vocabulary import mask_padding
from moelpr.model.model_spec import ModelSpec, NewTokens
from tests.support.saved_tensors import SavedTensors

pytestmark = pytest.mark.usefixtures("megatron")

NEW = NewTokens(first=100, number=20, base_vocab_size=110)
VOCABULARY, ROWS = NEW.end, 128  # without and with padding
TOKENS = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
# A mean over the tokens that count, as loss masks make it.
WEIGHTS = (torch.arange(34).view(2, 17) % 3 > 0) / 23
STAGES = {"stage1": {"moe_aux_loss_coeff": 0.01}, "stage2": {"lpr_loss_coeff": 0.1}, "stage0": {}}


def losses(model: torch.nn.Module) -> torch.Tensor:
    bits = (torch.arange(34).view(2, 17) % 5 > 2).to(torch.uint8)
    positions = torch.arange(17).expand(2, 17)
    return model(TOKENS, positions, None, labels=TOKENS.roll(-1, 1), padding_mask=bits)


def two_models(spec: ModelSpec, stage: str, **changes: object) -> list[torch.nn.Module]:
    """The same model with Megatron's loss and with the fused one."""
    spec = replace(spec, megatron_args=spec.megatron_args | changes | {"vocab_size": ROWS})
    models = [build_model(spec, **STAGES[stage]) for _ in range(2)]
    with torch.no_grad():
        for weight, same in zip(*(model.parameters() for model in models), strict=True):
            same.copy_(weight.mul_(3))  # so that tokens are not all equally likely
    freeze(models, stage, new_tokens=NEW)
    mask_padding(models[:1], VOCABULARY)
    fuse_loss(models[1:], VOCABULARY)
    for model in models:
        model.train().config.lpr_token_weight = torch.tensor(1.0)
    return models


@pytest.mark.parametrize("chunk", [1 << 28, ROWS * 10, 1])  # in one, the last one smaller, each token in its own
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "changes", [{}, {"untie_embeddings_and_output_weights": True}, {"use_mup": True, "mup_output_mult": 0.1}]
)
def test_losses_and_gradients_are_megatrons(moe_spec: ModelSpec, monkeypatch, chunk, stage, changes) -> None:
    monkeypatch.setattr(fused_loss, "CHUNK_LOGITS", chunk)
    models = two_models(moe_spec, stage, **changes)
    expected, actual = map(losses, models)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert actual.std() > 0.01
    for one in (expected, actual):
        (one * WEIGHTS).sum().backward()
    trained = 0
    for megatrons, ours in zip(*(model.parameters() for model in models), strict=True):
        if megatrons.requires_grad:
            trained += 1
            rows = slice(NEW.first, NEW.end) if stage == "stage0" else slice(None)
            assert megatrons.grad[rows].any()
            assert (ours.grad - megatrons.grad)[rows].norm() <= 2e-6 * megatrons.grad[rows].norm()
    assert trained
    with torch.no_grad():  # validation
        torch.testing.assert_close(losses(models[1]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", ["stage1", "stage0"])
def test_no_logits_are_kept(moe_spec: ModelSpec, stage: str) -> None:
    kept = []
    for model in two_models(moe_spec, stage):
        saved = SavedTensors()
        saved.parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            output = losses(model)
        kept.append(saved.live)
        del output
    softmax, mask_and_targets, of_hidden = 34 * ROWS * 4, 34 * (1 + 8), 34 * 32 * 4
    of_new_rows = 34 * NEW.number * 4 if stage == "stage0" else 0
    assert kept[0] - kept[1] == softmax + mask_and_targets - of_hidden - of_new_rows
