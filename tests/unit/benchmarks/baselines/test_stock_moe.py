from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import stock_moe
from benchmarks.optimizer_steps import our_step, random_batch
from moelpr.model.families.families import family_named
from moelpr.model.families.tables import pieces, sizes_of
from moelpr.model.model_spec import ModelSpec


def copy_weights(ours: torch.nn.Module, stock: torch.nn.Module, spec: ModelSpec) -> None:
    """Use the exporter's name table; the stock model stacks the experts."""
    assert spec.moe is not None
    state, copied = ours.state_dict(), {}
    for piece in pieces(family_named(spec.family).table, spec):
        name = piece.key.replace("linear_qkv.layer_norm", "linear_qkv_layer_norm").replace("experts.experts", "experts")
        name = name.replace("self_attention.linear_qkv_layer_norm_weight", "input_layernorm.weight")
        tensor = state[name] if piece.stack_index is None else state[name][piece.stack_index]
        parts = piece.transform.to_hf(tensor, sizes_of(spec))
        for names in piece.places:
            copied |= dict(zip(names, parts, strict=True))
    for name in stock.state_dict():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            prefix, _, kind = name.rpartition(".")
            experts = [
                torch.cat([copied.pop(f"{prefix}.{number}.{part}_proj.weight") for part in kind.split("_")[:-1]])
                for number in range(spec.moe.num_experts)
            ]
            copied[name] = torch.stack(experts)
    missing = stock.load_state_dict(copied, strict=False).missing_keys
    assert all("shared_expert" in name for name in missing), missing


@pytest.mark.parametrize("copies", [1, 2])
def test_the_stock_model_has_our_loss_and_router_gradients(spec: ModelSpec, copies: int) -> None:
    assert spec.moe is not None
    spec = replace(spec, moe=replace(spec.moe, original_copies=copies))
    torch.manual_seed(3)
    batch = random_batch(spec, 4)
    ours, stock = our_step(spec, "stage2", batch), stock_moe.StockStep(spec, "stage2", batch)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # no two experts, gates or norms alike
    copy_weights(ours.model, stock.model, spec)
    total, count = ours.forward_backward()[0]["lm loss"]
    loss, next_token = stock.loss()
    loss.backward()
    torch.testing.assert_close(total / count, next_token.detach(), rtol=1e-5, atol=0)
    for our_router, router in zip(ours.routers, stock.routers, strict=True):
        assert router.weight.grad.abs().sum() > 0
        torch.testing.assert_close(our_router.weight.main_grad, router.weight.grad, rtol=1e-4, atol=1e-7)


def test_the_mask_keeps_the_original_expert(spec: ModelSpec) -> None:
    torch.manual_seed(3)
    step = stock_moe.StockStep(spec, "stage1", random_batch(spec, 4))
    experts = step.model.model.layers[0].mlp.experts
    before = experts.down_proj.detach().clone()
    assert step() > step()
    moved = (experts.down_proj != before).flatten(1).any(dim=1)
    assert moved.tolist() == [False, True, True, True]
