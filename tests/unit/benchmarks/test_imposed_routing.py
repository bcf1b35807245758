"""Recorded choices against evaluation's statistics, and routers that make imposed choices."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.baselines.stock_moe import StockStep
from benchmarks.imposed_routing import LENGTH, WINDOWS, impose, recorded_routing
from benchmarks.optimizer_steps import our_step, plain_step, random_batch
from examples.languages import EXPANDED, ORIGINAL
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.models import load_model
from moelpr.measure.evaluate.routing import RoutingObserver
from moelpr.model.model_spec import ModelSpec


@pytest.fixture(scope="module")
def demo(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MoE of six experts, 1 and 2 of them copies, and more documents per language than are read."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "corpus").mkdir()
    random.seed(0)
    for number, language in enumerate((*ORIGINAL, *EXPANDED)):
        weights = (1, number + 1)  # the languages' routing differs
        texts = ["".join(random.choices("ab", weights, k=2 * LENGTH)) for _ in range(WINDOWS + 2)]
        lines = [json.dumps({"text": text}) + "\n" for text in ["ab", *texts]]
        (folder / "corpus" / f"validation.{language}.jsonl").write_text("".join(lines))
    moe = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}
    moe |= {"shared_expert_intermediate_size": 0, "max_position_embeddings": LENGTH, "num_original_experts": 2}
    model = make_model("Qwen2MoeForCausalLM", tokenizer=True, **moe)
    for stage in ("stage1", "stage2"):
        shutil.copytree(model, folder / f"{stage}-hf")
    return folder


@pytest.mark.parametrize(("stage", "languages"), [("stage1", EXPANDED), ("stage2", (*ORIGINAL, *EXPANDED))])
def test_recorded_choices_are_those_that_evaluation_counts(demo, stage, languages) -> None:
    routing = recorded_routing(demo, stage)
    loaded = load_model(demo / "stage2-hf", device="cpu")
    observer = RoutingObserver(loaded)
    for language in languages:
        lines = (demo / "corpus" / f"validation.{language}.jsonl").read_text().splitlines()[1:]
        documents = [[0, *loaded.tokenizer(json.loads(line)["text"])["input_ids"]] for line in lines]
        windows = [ids[first : first + LENGTH] for ids in documents for first in range(0, len(ids), LENGTH)]
        tokens = torch.tensor([window for window in windows if len(window) == LENGTH][:WINDOWS])
        with torch.no_grad(), observer.observe(torch.ones_like(tokens).bool()):
            loaded.logits(tokens)
    counted = observer.result()
    assert counted is not None and counted.layers == [0, 2, 3]
    assert routing.experts == {"new_experts": 4, "original_copies": 2, "topk": 2}
    assert len(routing.choices_TK) == 3 * len(languages) * WINDOWS * LENGTH
    for choices, expected in [
        (routing.choices_TK, counted.chosen_share),
        (routing.choices_TK[:, 0], counted.first_choice_share),
    ]:
        shares = choices.flatten().bincount(minlength=6) / len(choices)
        torch.testing.assert_close(shares, torch.tensor(expected).mean(dim=0), rtol=0, atol=1e-6)


def test_a_missing_demo_is_named_with_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/stage1-hf .*--demo"):
        recorded_routing(tmp_path, "stage1")


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
    stock = StockStep(spec, "stage2", batch)
    logits = []
    for router in stock.routers:
        impose(router, choices)
        router.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    before = [router.weight.clone() for router in stock.routers]
    stock()
    for router, logits_TE, weight in zip(stock.routers, logits, before, strict=True):
        assert torch.equal(logits_TE.topk(2).indices.sort(dim=1).values, choices.sort(dim=1).values)
        assert not torch.equal(router.weight, weight)


def test_without_a_demo_all_places_are_chosen_equally_often() -> None:
    routing = recorded_routing(None, "stage2")
    assert routing.experts == {"new_experts": 4, "original_copies": 2, "topk": 2}
    counts = routing.part(3, 6000).flatten().bincount(minlength=6)
    assert counts.sum() == 12_000 and (counts - 2000).abs().max() < 200
