import pytest
import torch

from benchmarks.baselines import stock_moe
from benchmarks.optimizer_steps import our_step, random_batch
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.layers.weights import load_weights
from moelpr.model.model_spec import ModelSpec
from tests.support.hf_models import load_stock, write_export


@pytest.mark.parametrize("copies", [1, 2])
def test_the_stock_model_has_our_loss_and_router_gradients(spec: ModelSpec, copies: int, make_model, tmp_path) -> None:
    """A checkpoint and its export, whose experts differ."""
    export = write_export(make_model("Qwen2ForCausalLM"), tmp_path, NewExperts(3, original_copies=copies), noise=0.5)
    spec = ModelSpec.read(tmp_path / "megatron")
    torch.manual_seed(3)
    batch = random_batch(spec, 4)
    ours, stock = our_step(spec, "stage2", batch), stock_moe.StockStep(spec, "stage2", batch)
    load_weights([ours.model], [tmp_path / "megatron" / "release"])
    stock.model.load_state_dict(load_stock(export).state_dict())
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


def test_the_dense_stock_model_has_our_loss_and_trains_its_ffns_only(spec: ModelSpec, make_model, tmp_path) -> None:
    dense = make_model("Qwen2ForCausalLM")
    hf_to_mcore(dense, tmp_path / "megatron", None)
    spec = ModelSpec.read(tmp_path / "megatron")
    torch.manual_seed(3)
    batch = random_batch(spec, 4)
    ours, stock = our_step(spec, "ffn", batch), stock_moe.StockStep(spec, "ffn", batch)
    load_weights([ours.model], [tmp_path / "megatron" / "release"])
    stock.model.load_state_dict(load_stock(dense).state_dict())
    before = [{name: its.clone() for name, its in model.named_parameters()} for model in (ours.model, stock.model)]
    assert ours() == pytest.approx(stock(), rel=1e-5)
    for model, old in zip((ours.model, stock.model), before, strict=True):
        moved = {name for name, its in model.named_parameters() if not torch.equal(its, old[name])}
        assert moved == {name for name in old if ".mlp." in name}
