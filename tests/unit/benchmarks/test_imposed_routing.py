from types import SimpleNamespace

import torch

from benchmarks.baselines.stock_moe import StockStep
from benchmarks.imposed_routing import impose
from benchmarks.optimizer_steps import our_step, plain_step, random_batch
from moelpr.model.model_spec import ModelSpec


def test_choices_are_imposed_on_logits_in_bf16() -> None:
    """On a GPU, the peers compute in it."""
    router = SimpleNamespace(gating=lambda hidden: hidden.new_zeros(*hidden.shape[:-1], 4))
    choices = torch.tensor([[3, 1], [0, 2]])
    impose(router, choices)
    logits = router.gating(torch.ones(1, 2, 8, dtype=torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits.topk(2).indices[0].sort().values, choices.sort().values)


def test_every_kind_of_router_makes_imposed_choices_and_keeps_its_gradient(spec: ModelSpec) -> None:
    batch = random_batch(spec, 2)
    choices = torch.rand(32, 4).argsort(dim=1)[:, :2]
    chosen: list[torch.Tensor] = []
    for step in (our_step(spec, "stage2", batch), plain_step(spec, batch)):
        for router in step.routers:
            impose(router, choices)
            router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1]))
        step()
        assert all(router.weight.main_grad.abs().sum() > 0 for router in step.routers)
    assert len(chosen) == 4
    for is_chosen in chosen:
        assert torch.equal(is_chosen.nonzero()[:, 1].view(32, 2), choices.sort(dim=1).values)
    stock, chosen = StockStep(spec, "stage2", batch), []
    for router in stock.routers:
        impose(router, choices)
        router.register_forward_hook(lambda module, inputs, output: chosen.append(output[0].topk(2).indices))
    before = [router.weight.clone() for router in stock.routers]
    stock()
    for router, indices, weight in zip(stock.routers, chosen, before, strict=True):
        assert torch.equal(indices.sort(dim=1).values, choices.sort(dim=1).values)
        assert not torch.equal(router.weight, weight)
