"""GPUs that PyTorch cannot use are an error, little memory is a warning."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moelpr.base import machine
from moelpr.model.megatron import cpu
from moelpr.model.model_spec import ModelSpec
from moelpr.plan.memory import CPU, Workload, model_parts, stage_memories


@pytest.mark.parametrize(
    ("cuda", "message"), [("13.2", "NVIDIA's driver is too old for CUDA 13.2"), (None, "is built without CUDA")]
)
def test_gpus_that_pytorch_cannot_use_are_an_error_unless_they_are_hidden(
    gathered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str
) -> None:
    from moelpr.train.arguments.checks import find_problems

    (tmp_path / "nvidia0").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpu, "is_needed", lambda: True)
    (problem,) = find_problems(gathered())
    assert message in problem and "CUDA_VISIBLE_DEVICES=" in problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_problems(gathered()) == []


@pytest.mark.parametrize(("free_gib", "is_warned"), [(0.9, True), (1.1, False)])
def test_more_memory_than_is_free_is_a_warning(gathered, monkeypatch, free_gib: float, is_warned: bool) -> None:  # noqa: ANN001
    from moelpr.train.arguments.checks import hardware

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(hardware, "expected_memory", lambda run: 1 << 29)
    monkeypatch.setattr(machine, "free_memory", lambda: int(free_gib * 2**30))
    notes = list(hardware.note_memory(gathered(ranks=2)))
    assert len(notes) == is_warned
    assert not notes or ("MiB" in notes[0] and "--micro-batch-size 3" in notes[0])


@pytest.mark.parametrize(("free", "is_warned"), [(2.1, False), (1.9, True)])
def test_a_host_without_room_for_the_optimizer_is_a_warning(gathered, monkeypatch, free: float, is_warned) -> None:  # noqa: ANN001
    from moelpr.train.arguments.checks import hardware

    run = gathered("--optimizer-cpu-offload", "--use-distributed-optimizer")
    planned = hardware.as_planned(run)
    (rank,) = stage_memories(run.spec, model_parts(run.spec), *planned)
    assert hardware.expected_memory(run) == rank.total_bytes + rank.host_bytes + hardware.PROCESS_BYTES
    monkeypatch.setattr(cpu, "is_needed", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(machine, "free_memory", lambda: int(free * rank.host_bytes))
    notes = list(hardware.note_host_memory(run))
    assert len(notes) == is_warned
    assert not notes or ("--optimizer-cpu-offload needs" in notes[0] and "each of 2 ranks" in notes[0])


@pytest.mark.parametrize(("need_gib", "is_warned"), [(71, False), (73, True)])
def test_a_rank_that_may_not_fit_its_gpu_is_a_warning(gathered, monkeypatch, need_gib: int, is_warned: bool) -> None:  # noqa: ANN001
    from moelpr.train.arguments.checks import hardware

    run = gathered()
    monkeypatch.setattr(cpu, "is_needed", lambda: False)
    monkeypatch.setattr(hardware, "expected_memory", lambda run: need_gib << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = {0: 94 << 30, 1: 80 << 30}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu]))
    notes = list(hardware.note_memory(run))
    assert len(notes) == is_warned
    assert not notes or ("73 GiB" in notes[0] and "80 GiB" in notes[0] and "moelpr layouts" in notes[0])


@pytest.mark.parametrize(
    ("stage", "flags", "ranks", "layout"),
    [
        ("stage1", "", 2, {"dp": 2}),
        ("stage1", "--use-distributed-optimizer --expert-model-parallel-size 2", 2, {"ep": 2, "dp": 2}),
        ("stage1", "--recompute-granularity selective --recompute-modules moe", 2, {"dp": 2, "recompute": "selective"}),
        ("stage1", "--train-new-embeddings", 1, {}),
        ("stage0", "", 1, {}),
        ("stage2", "--train-everything", 1, {}),
        ("dense", "", 2, {"dp": 2}),
    ],
)
def test_the_expected_memory_is_the_planners_plus_the_process(
    gathered, upcycled, dense, stage, flags, ranks, layout
) -> None:
    from moelpr.plan.layouts import PlannedLayout
    from moelpr.train.arguments.checks.hardware import PROCESS_BYTES, expected_memory

    start = dense if stage == "dense" else upcycled
    spec = ModelSpec.read(Path(start))
    planned = PlannedLayout(**layout, distributed_optimizer="--use-distributed-optimizer" in flags)
    trains = "--train-new-embeddings" in flags, "--train-everything" in flags
    workload = Workload(stage, 32, 6, 12, "fp32", CPU, *trains)
    (rank,) = stage_memories(spec, model_parts(spec), planned, workload)
    assert (
        expected_memory(gathered(*flags.split(), start=start, ranks=ranks, stage=stage))
        == rank.total_bytes + PROCESS_BYTES
    )


def test_nothing_is_expected_of_what_the_planner_does_not_support(gathered, dense: str) -> None:
    from moelpr.train.arguments.checks.hardware import expected_memory

    assert expected_memory(gathered(start=dense, stage="stage1")) is None
    assert expected_memory(gathered("--micro-batch-size", "0")) is None
    uneven = "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"
    assert expected_memory(gathered(*uneven.split(), ranks=2)) is None


def test_settings_that_need_less_are_those_that_the_run_does_not_have(gathered) -> None:
    from moelpr.train.arguments.checks.hardware import smaller_settings

    first = smaller_settings(gathered(ranks=2))
    assert "--use-distributed-optimizer" in first and "--micro-batch-size 3" in first and "selective" in first
    small = "--use-distributed-optimizer --micro-batch-size 1 --recompute-granularity full --recompute-method uniform"
    second = smaller_settings(gathered(*small.split(), ranks=2))
    assert not any(flag in second for flag in ("--micro-batch-size", "recompute")) and "more ranks" in second
