"""The Python loop computes what we compute: same losses and router gradients for the same weights."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import loop_moe
from benchmarks.optimizer_steps import our_step, random_batch
from moelpr.model.families.families import family_named
from moelpr.model.families.tables import pieces, sizes_of
from moelpr.model.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")


def copy_weights(ours: torch.nn.Module, loop: torch.nn.Module, spec: ModelSpec) -> None:
    """Use the exporter's name table, whose names are those of the loop's modules."""
    state, copied = ours.state_dict(), {}
    for piece in pieces(family_named(spec.family).table, spec):
        name = piece.key.replace("linear_qkv.layer_norm", "linear_qkv_layer_norm").replace("experts.experts", "experts")
        name = name.replace("self_attention.linear_qkv_layer_norm_weight", "input_layernorm.weight")
        tensor = state[name] if piece.stack_index is None else state[name][piece.stack_index]
        parts = piece.transform.to_hf(tensor, sizes_of(spec))
        for names in piece.places:
            copied |= {part: value.clone() for part, value in zip(names, parts, strict=True)}
    loop.load_state_dict(copied)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_loop_has_our_loss_and_our_gradients(spec: ModelSpec, stage: str, copies: int) -> None:
    assert spec.moe is not None
    spec = replace(spec, moe=replace(spec.moe, original_copies=copies))
    torch.manual_seed(3)
    batch = random_batch(spec, 4)
    step = our_step(spec, stage, batch)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # no two experts, gates or norms alike
    loop = loop_moe.LoopStep(spec, stage, batch)
    copy_weights(step.model, loop.model, spec)

    total, count = step.forward_backward()[0]["lm loss"]
    loss, next_token = loop_moe.loss(
        loop.model, batch["tokens"], batch["labels"], batch["is_original"].bool(), loop.alpha, loop.gamma
    )
    loss.backward()
    torch.testing.assert_close(total / count, next_token.detach(), rtol=1e-5, atol=0)
    for ours, theirs in zip(step.model.decoder.layers, loop.model.model.layers, strict=True):
        expected = theirs.mlp.gate.weight.grad
        assert expected.abs().sum() > 0
        torch.testing.assert_close(ours.mlp.router.weight.main_grad, expected, rtol=1e-4, atol=1e-7)
        for index, expert in enumerate(theirs.mlp.experts):
            if stage == "stage2" or index < copies:
                assert expert.down_proj.weight.grad is None
                continue
            found = ours.mlp.experts.linear_fc2.weight.main_grad[index - copies]
            torch.testing.assert_close(found, expert.down_proj.weight.grad, rtol=1e-4, atol=1e-7)
    trainable = {name for name, parameter in step.model.named_parameters() if parameter.requires_grad}
    num_trained = sum(parameter.numel() for name, parameter in step.model.named_parameters() if name in trainable)
    assert num_trained == sum(parameter.numel() for parameter in loop.trainable), "both train the same parameters"
