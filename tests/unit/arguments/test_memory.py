"""The planner's figures for a run's settings, and settings that need less."""

from pathlib import Path

import pytest

from moelpr.model_spec import ModelSpec
from moelpr.plan.memory import CPU, Workload, model_parts, stage_memories


@pytest.mark.parametrize(
    ("stage", "flags", "ranks", "layout"),
    [
        ("stage1", "", 2, {"dp": 2}),
        ("stage1", "--use-distributed-optimizer --expert-model-parallel-size 2", 2, {"ep": 2, "dp": 2}),
        ("stage1", "--recompute-granularity selective --recompute-modules moe", 2, {"dp": 2, "recompute": "selective"}),
        ("stage1", "--train-new-embeddings", 1, {}),
        ("stage0", "", 1, {}),
    ],
)
def test_the_expected_memory_is_the_planners_plus_the_process(gathered, upcycled, stage, flags, ranks, layout) -> None:
    from moelpr.arguments.memory import PROCESS_BYTES, expected_memory
    from moelpr.layouts import PlannedLayout

    spec = ModelSpec.read(Path(upcycled))
    planned = PlannedLayout(**layout, distributed_optimizer="--use-distributed-optimizer" in flags)
    workload = Workload(stage, 32, 6, 12, "fp32", CPU, new_embeddings="--train-new-embeddings" in flags)
    (rank,) = stage_memories(spec, model_parts(spec), planned, workload)
    assert expected_memory(gathered(*flags.split(), ranks=ranks, stage=stage)) == rank.total_bytes + PROCESS_BYTES


def test_nothing_is_expected_of_what_the_planner_does_not_support(gathered, dense: str) -> None:
    from moelpr.arguments.memory import expected_memory

    assert expected_memory(gathered(start=dense, stage="dense")) is None
    assert expected_memory(gathered("--micro-batch-size", "0")) is None


def test_settings_that_need_less_are_those_that_the_run_does_not_have(gathered) -> None:
    from moelpr.arguments.memory import smaller_settings

    first = smaller_settings(gathered(ranks=2))
    assert "--use-distributed-optimizer" in first and "--micro-batch-size 3" in first and "selective" in first
    small = "--use-distributed-optimizer --micro-batch-size 1 --recompute-granularity full --recompute-method uniform"
    second = smaller_settings(gathered(*small.split(), ranks=2))
    assert not any(flag in second for flag in ("--micro-batch-size", "recompute")) and "more ranks" in second
