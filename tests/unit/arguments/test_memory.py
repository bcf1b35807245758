"""The planner's figures for a run's settings, and settings that need less."""

from pathlib import Path

import pytest

from moelpr.model_spec import ModelSpec
from moelpr.plan.memory import CPU, Workload, model_parts, stage_memories


@pytest.fixture
def gathered(upcycled: str, data: list[str], monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    def gather(*argv: str, ranks: int = 1, start: str = upcycled, stage: str = "stage1"):  # noqa: ANN202
        from moelpr.arguments.flags import all_arguments
        from moelpr.arguments.settings import RunSettings, apply_machine

        steps = "--seq-length 32 --lr 1e-3 --train-iters 2 --global-batch-size 12 --micro-batch-size 6"
        command = ["--stage", stage, "--pretrained-checkpoint", start, *steps.split(), *data, *argv]
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        run = RunSettings.gather(command, all_arguments())
        apply_machine(run.args)
        return run

    return gather


def test_the_expected_memory_is_the_planners_plus_the_process(gathered, upcycled: str) -> None:
    from moelpr.arguments.memory import PROCESS_BYTES, expected_memory
    from moelpr.layouts import PlannedLayout

    spec = ModelSpec.read(Path(upcycled))
    for argv, layout in (
        ([], PlannedLayout(dp=2, distributed_optimizer=False)),
        (["--use-distributed-optimizer", "--expert-model-parallel-size", "2"], PlannedLayout(ep=2, dp=2)),
        (["--recompute-granularity", "selective", "--recompute-modules", "moe"],
         PlannedLayout(dp=2, recompute="selective", distributed_optimizer=False)),
    ):  # fmt: skip
        (planned,) = stage_memories(spec, model_parts(spec), layout, Workload("stage1", 32, 6, 12, "fp32", CPU))
        assert expected_memory(gathered(*argv, ranks=2)) == planned.total_bytes + PROCESS_BYTES


@pytest.mark.parametrize(("stage", "argv"), [("stage0", []), ("stage1", ["--train-new-embeddings"])])
def test_training_rows_of_new_tokens_is_expected_to_need_what_the_planner_says(
    gathered, upcycled: str, stage: str, argv: list[str]
) -> None:
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


@pytest.mark.parametrize(("free_gib", "is_warned"), [(0.9, True), (1.1, False)])
def test_more_memory_than_is_free_is_a_warning(gathered, monkeypatch, free_gib: float, is_warned: bool) -> None:  # noqa: ANN001
    from moelpr import machine
    from moelpr.arguments.checks import memory

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(memory, "expected_memory", lambda run: 1 << 29)
    monkeypatch.setattr(machine, "free_memory", lambda: int(free_gib * 2**30))
    notes = list(memory.note_cpu_memory(gathered(ranks=2)))
    assert len(notes) == is_warned
    assert not notes or ("0.9 GiB" in notes[0] and "--micro-batch-size 3" in notes[0])
