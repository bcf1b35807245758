from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.plan.candidates import DoesNotFitError, fitting, most_experts, numbers_of_experts, with_num_experts
from moelpr.plan.gpus import GIB, GPUS, Cluster
from moelpr.plan.memory import Workload, checkpoint_bytes, model_parts
from moelpr.plan.stage_plan import PAPER_GLOBAL_BATCH_SIZE, PAPER_SEQ_LENGTH, RETAIN_INTERVAL, plan_stage
from tests.unit.conftest import SHAPE as TINY_SHAPE

SHAPE = TINY_SHAPE | dict(num_layers=6, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8)
SHAPE |= dict(num_query_groups=4, kv_channels=64, vocab_size=1000, max_position_embeddings=2048)
SPEC = ModelSpec("qwen2", "float32", SHAPE, MoeSpec(8, 2, tuple(range(6)), original_copies=2))
WORKLOAD = Workload("stage1", 512, 1, 64)
RECIPES = Path(__file__).parents[3] / "launch/recipes"


def cluster(gpus: int, gib: float) -> Cluster:
    return Cluster(gpus, 8, gib, 0, GPUS["h100-80"])


def test_a_number_of_tokens_is_a_number_of_checkpoints() -> None:
    plan = plan_stage(SPEC, WORKLOAD, cluster(2, 80))
    assert plan.tokens_per_s and plan_stage(SPEC, WORKLOAD, Cluster(2, 8, 80, 8)).tokens_per_s is None
    assert plan.workload.micro_batch_size > 1 and plan.flags == plan.best.flags(plan.workload)
    one = checkpoint_bytes(model_parts(SPEC), plan.workload.trained, "bf16", True, trained_only=False)
    assert plan.checkpoints_bytes(10**9) == 5 * one  # 30,518 steps: 10^9 / (64 · 512), rounded up


def test_a_run_keeps_as_many_checkpoints_as_the_papers_recipe_says() -> None:
    text = (RECIPES / "paper-stage1.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe["save-retain-interval"] == RETAIN_INTERVAL
    workload = Workload("stage1", PAPER_SEQ_LENGTH["stage1"], 1, PAPER_GLOBAL_BATCH_SIZE)
    plan = plan_stage(SPEC, workload, Cluster(1, 8, 80, 8))
    kept = plan.checkpoints_bytes(recipe["train-iters"] * 512 * 1024) / plan.disk.checkpoint
    assert kept == 6 and "room for six" in text


@pytest.mark.parametrize(
    ("gpus", "numbers"),
    [(1, [8, 7, 6, 5, 4, 3, 2, 1]), (2, [8, 6, 4, 2, 1]), (8, [8, 4, 2, 1]), (32, [8, 4, 2, 1]), (6, [6, 3, 2, 1])],
)
def test_experts_are_chosen_so_that_they_divide_a_node(gpus: int, numbers: list[int]) -> None:
    assert numbers_of_experts(SPEC, cluster(gpus, 80)) == numbers


def test_the_most_experts_that_fit_are_chosen() -> None:
    """The GPU has room for exactly N experts, with recompute of their layers, or with full recompute for one expert."""
    for number, recompute in ((8, "selective"), (5, "selective"), (1, "selective"), (1, "full")):
        model = with_num_experts(SPEC, number)
        actual = {one.layout.recompute: one.peak.total_bytes for one in fitting(model, WORKLOAD, cluster(1, 80))}
        assert most_experts(SPEC, WORKLOAD, cluster(1, 1.001 * actual[recompute] / GIB)) == model
    with pytest.raises(DoesNotFitError):
        most_experts(SPEC, WORKLOAD, cluster(1, 0.1))


@pytest.mark.parametrize(("gib", "kinds"), [(0.9, 1), (0.2, 1), (0.1, 0)])
def test_every_smaller_model_that_is_suggested_fits(gib: float, kinds: int) -> None:
    """In one GPU; without room for a single change, also with the host's memory."""
    workload = replace(WORKLOAD, micro_batch_size=2)
    with pytest.raises(DoesNotFitError) as error:
        fitting(SPEC, workload, cluster(1, gib))
    assert error.value.usable_gib == gib < error.value.needed_gib
    actual = [one for one in error.value.remedies if one.gib]
    assert len(actual) == kinds
    for remedy in actual:
        moe, work = SPEC.moe, workload
        for flag, value in remedy.settings.items():
            name = flag.removeprefix("--").replace("-", "_")
            if name == "num_new_experts":
                moe = replace(moe, num_new_experts=value)
            else:  # a number, or None for a switch
                work = replace(work, **{name: value or True})
        best = fitting(replace(SPEC, moe=moe), work, cluster(1, gib))[0]
        assert best.peak.total_bytes == remedy.gib * GIB
        assert str(remedy) in str(error.value) and str(remedy).endswith(f"(fits in {remedy.gib:.1f} GiB)")
