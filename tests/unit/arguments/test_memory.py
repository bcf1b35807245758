"""The planner's figures for a run's settings, and settings that need less."""

from pathlib import Path

import pytest

from moelpr.model_spec import ModelSpec
from moelpr.plan.memory import CPU, Workload, model_parts, stage_memories


def test_the_expected_memory_is_the_planners_plus_the_process(gathered, upcycled: str) -> None:
    from moelpr.arguments.memory import PROCESS_BYTES, expected_memory
    from moelpr.layouts import PlannedLayout

    spec = ModelSpec.read(Path(upcycled))
    for flags, layout in {
        "": PlannedLayout(dp=2, distributed_optimizer=False),
        "--use-distributed-optimizer --expert-model-parallel-size 2": PlannedLayout(ep=2, dp=2),
        "--recompute-granularity selective --recompute-modules moe": PlannedLayout(
            dp=2, recompute="selective", distributed_optimizer=False
        ),
    }.items():
        (planned,) = stage_memories(spec, model_parts(spec), layout, Workload("stage1", 32, 6, 12, "fp32", CPU))
        assert expected_memory(gathered(*flags.split(), ranks=2)) == planned.total_bytes + PROCESS_BYTES


@pytest.mark.parametrize(("stage", "argv"), [("stage0", []), ("stage1", ["--train-new-embeddings"])])
def test_training_rows_of_new_tokens_is_expected_to_need_what_the_planner_says(gathered, upcycled, stage, argv) -> None:
    from moelpr.arguments.memory import PROCESS_BYTES, expected_memory
    from moelpr.layouts import PlannedLayout

    spec, layout = ModelSpec.read(Path(upcycled)), PlannedLayout(distributed_optimizer=False)
    workload = Workload(stage, 32, 6, 12, "fp32", CPU, new_embeddings=bool(argv))
    (planned,) = stage_memories(spec, model_parts(spec), layout, workload)
    assert expected_memory(gathered(*argv, stage=stage)) == planned.total_bytes + PROCESS_BYTES


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
