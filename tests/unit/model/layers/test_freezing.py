from dataclasses import replace

import pytest
import torch

from moelpr.model.layers.freezing import freeze
from moelpr.model.layers.loading import build_model
from moelpr.model.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@pytest.fixture(params=[1, 2], ids="m={}".format)
def model(request, moe_spec: ModelSpec):
    return build_model(replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=request.param)))


@pytest.mark.parametrize(
    ("stage", "modules"), [("stage1", ("router", "experts.linear_fc1", "experts.linear_fc2")), ("stage2", ("router",))]
)
def test_a_stage_trains_its_modules_only(model, stage: str, modules: tuple[str, ...]) -> None:
    freeze([model], stage)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"decoder.layers.{layer}.mlp.{name}.weight" for layer in range(3) for name in modules}


def test_a_pipeline_stage_that_trains_nothing_has_no_backward_pass(dense_spec: ModelSpec) -> None:
    """With full recompute too, which would repeat its forward pass first."""
    model = build_model(dense_spec, **FULL).train()
    freeze([model], "stage1")
    tokens = torch.randint(0, 128, (2, 16))
    output = model(tokens, torch.arange(16).expand(2, 16), attention_mask=None, labels=tokens)
    assert not output.requires_grad


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_a_frozen_embedding_with_recompute_still_trains(moe_spec: ModelSpec, stage: str, recompute: dict) -> None:
    """The gradients are those without recompute: none is lost or counted twice."""
    tokens = torch.randint(0, 128, (2, 16))
    positions = torch.arange(16).expand(2, 16)
    bits = torch.rand(2, 16) < 0.5
    models = [build_model(moe_spec, lpr_loss_coeff=0.1, moe_aux_loss_coeff=0.01, **extra) for extra in ({}, recompute)]
    models[1].load_state_dict(models[0].state_dict())
    gradients = []
    for model in models:
        freeze([model], stage)
        model.train().config.lpr_token_weight = torch.tensor(0.1)
        model(tokens, positions, attention_mask=None, labels=tokens, padding_mask=bits).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
    sums = [model.decoder.layers[0].mlp.router.routing_sums for model in models]
    torch.testing.assert_close(sums[1], sums[0])
