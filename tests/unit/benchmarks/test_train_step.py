"""The peer computes what we compute: same losses and router gradients for the same weights."""

import argparse

import pytest
import torch

from moelpr.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    from benchmarks.train_step import spec_of

    sizes = {"layers": 2, "hidden": 32, "ffn": 48, "head": 8, "new_experts": 3, "topk": 2, "vocabulary": 64}
    return spec_of(argparse.Namespace(**sizes, length=16))


def copy_weights(ours: torch.nn.Module, loop: torch.nn.Module, spec: ModelSpec) -> None:
    """By the exporter's name table, whose names the peer's modules have."""
    from moelpr.families.families import family_named
    from moelpr.families.tables import pieces, sizes_of

    state, copied = ours.state_dict(), {}
    for piece in pieces(family_named(spec.family).table, spec):
        name = piece.key.replace("linear_qkv.layer_norm", "linear_qkv_layer_norm").replace("experts.experts", "experts")
        name = name.replace("self_attention.linear_qkv_layer_norm_weight", "input_layernorm.weight")
        tensor = state[name] if piece.stack_index is None else state[name][piece.stack_index]
        parts = piece.transform.to_hf(tensor, sizes_of(spec))
        copied |= {part: value.clone() for part, value in zip(piece.hf_names, parts, strict=True)}
    loop.load_state_dict(copied)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_python_loop_has_our_loss_and_our_gradients(spec: ModelSpec, stage: str) -> None:
    from benchmarks.peers import loop_moe
    from benchmarks.train_step import our_step, random_batch

    torch.manual_seed(3)
    batch = random_batch(spec, 4)
    step = our_step(spec, stage, batch)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # no two experts, gates or norms alike
    peer = loop_moe.LoopStep(spec, stage, batch)
    copy_weights(step.model, peer.model, spec)

    total, count = step.forward_backward()[0]["lm loss"]
    loss, next_token = loop_moe.loss(
        peer.model, batch["tokens"], batch["labels"], batch["is_original"].bool(), peer.alpha, peer.gamma
    )
    loss.backward()
    torch.testing.assert_close(total / count, next_token.detach(), rtol=1e-5, atol=0)
    for ours, theirs in zip(step.model.decoder.layers, peer.model.model.layers, strict=True):
        expected = theirs.mlp.gate.weight.grad
        assert expected.abs().sum() > 0
        torch.testing.assert_close(ours.mlp.router.weight.main_grad, expected, rtol=1e-4, atol=1e-7)
        for index, expert in enumerate(theirs.mlp.experts):
            if stage == "stage2" or index == 0:
                assert expert.down_proj.weight.grad is None
                continue
            found = ours.mlp.experts.linear_fc2.weight.main_grad[index - 1]
            torch.testing.assert_close(found, expert.down_proj.weight.grad, rtol=1e-4, atol=1e-7)
    trainable = {name for name, parameter in step.model.named_parameters() if parameter.requires_grad}
    new = sum(parameter.numel() for name, parameter in step.model.named_parameters() if name in trainable)
    assert new == sum(parameter.numel() for parameter in peer.trainable), "both train the same parameters"


def test_plain_megatron_trains_every_parameter(spec: ModelSpec) -> None:
    from benchmarks.train_step import plain_step, random_batch

    step = plain_step(spec, random_batch(spec, 2))
    first, second = step(), step()
    assert second < first
    assert all(parameter.requires_grad for parameter in step.model.parameters())
    assert len(step.model.decoder.layers[0].mlp.experts.local_experts) == 4


def test_needed_work_of_a_layer_worked_out_by_hand(spec: ModelSpec) -> None:
    """T = 32 tokens, S = 16, H = 32, F = 48, q = 32, kv = 16, E = 4, K = 2, V = 64; 10 rows go to the original."""
    from benchmarks.train_step import needed_flops

    output, projections, attention, router = 2 * 32 * 32 * 64, 2 * 32 * (2048 + 1024), 2 * 32 * 16 * 32, 2 * 32 * 32 * 4
    row = 6 * 32 * 48
    forward = projections + attention + router + 64 * row
    assert needed_flops(spec, "stage2", 2, [10]) == 2 * output + forward + router
    assert needed_flops(spec, "stage1", 2, [10]) == 2 * output + forward + router + 54 * row + 54 * row / 3
    above = forward + projections + 2 * attention + router + 64 * row + router
    assert needed_flops(spec, "stage2", 2, [10, 10]) == 2 * output + forward + router + above
