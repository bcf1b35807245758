"""Stock transformers computes what the Python loop computes, and its mask keeps the original experts."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import loop_moe, stock_moe
from benchmarks.optimizer_steps import random_batch
from moelpr.model.model_spec import ModelSpec


def stacked(loop: torch.nn.Module, stock: torch.nn.Module) -> None:
    """Copy the loop's weights into the stock model, which stacks the experts."""
    state = stock.state_dict()
    for name, value in loop.state_dict().items():
        if ".mlp.experts." not in name:
            state[name] = value
    for number, layer in enumerate(loop.model.layers):
        prefix, experts = f"model.layers.{number}.mlp.experts.", layer.mlp.experts
        gates_and_ups = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in experts]
        state[f"{prefix}gate_up_proj"] = torch.stack(gates_and_ups)
        state[f"{prefix}down_proj"] = torch.stack([expert.down_proj.weight for expert in experts])
    stock.load_state_dict(state)


@pytest.mark.parametrize("copies", [1, 2])
def test_the_stock_model_has_the_loops_loss_and_router_gradients(spec: ModelSpec, copies: int) -> None:
    assert spec.moe is not None
    spec = replace(spec, moe=replace(spec.moe, original_copies=copies))
    torch.manual_seed(3)
    batch = random_batch(spec, 4)
    loop, stock = loop_moe.LoopStep(spec, "stage2", batch), stock_moe.StockStep(spec, "stage2", batch)
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    stacked(loop.model, stock.model)
    is_original = batch["is_original"].bool()
    expected, _ = loop_moe.loss(loop.model, batch["tokens"], batch["labels"], is_original, loop.alpha, loop.gamma)
    found, _ = stock.loss()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    expected.backward()
    found.backward()
    for router, moe in zip(stock.routers, loop.routers, strict=True):
        assert router.weight.grad.abs().sum() > 0
        torch.testing.assert_close(router.weight.grad, moe.gate.weight.grad, rtol=1e-4, atol=1e-7)


def test_the_mask_keeps_the_original_expert(spec: ModelSpec) -> None:
    torch.manual_seed(3)
    step = stock_moe.StockStep(spec, "stage1", random_batch(spec, 4))
    experts = step.model.model.layers[0].mlp.experts
    before = experts.down_proj.detach().clone()
    assert step() > step()
    moved = (experts.down_proj != before).flatten(1).any(dim=1)
    assert moved.tolist() == [False, True, True, True]
