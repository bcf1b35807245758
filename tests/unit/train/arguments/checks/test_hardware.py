from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moelpr.base import machine
from moelpr.model.megatron import cpu
from moelpr.model.model_spec import ModelSpec
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import CPU, PROCESS_BYTES, Workload, model_parts, stage_memories
from moelpr.train.arguments.checks import find_problems, hardware
from moelpr.train.arguments.checks.hardware import expected_memory


@pytest.mark.parametrize(
    ("cuda", "message"), [("13.2", "NVIDIA's driver is too old for CUDA 13.2"), (None, "is built without CUDA")]
)
def test_gpus_that_pytorch_cannot_use_are_an_error_unless_they_are_hidden(
    gathered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpu, "is_needed", lambda: True)
    (problem,) = find_problems(gathered())
    assert message in problem and "CUDA_VISIBLE_DEVICES=" in problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_problems(gathered()) == []


@pytest.mark.parametrize("is_warned", [False, True])
def test_more_memory_than_there_is_is_a_warning(gathered, monkeypatch, is_warned: bool) -> None:
    """The memory of ranks on this machine, of the smallest GPU, and of this machine for an optimizer on the host."""
    run, offloaded = gathered(ranks=2), gathered("--optimizer-cpu-offload", "--use-distributed-optimizer")
    (rank,) = hardware.as_planned(offloaded).memories
    assert hardware.expected_memory(offloaded) == rank.total_bytes + rank.host_bytes + PROCESS_BYTES
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(hardware, "expected_memory", lambda run: 1 << 29)
    monkeypatch.setattr(machine, "free_memory", lambda: int((0.9 if is_warned else 1.1) * 2**30))
    of_ranks = [*hardware.note_memory(run)]
    monkeypatch.setattr(cpu, "is_needed", lambda: False)
    monkeypatch.setattr(hardware, "expected_memory", lambda run: (73 if is_warned else 71) << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = {0: 94 << 30, 1: 80 << 30}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu]))
    of_a_gpu = [*hardware.note_memory(run)]
    monkeypatch.setattr(machine, "free_memory", lambda: int((1.9 if is_warned else 2.1) * rank.host_bytes))
    of_the_host = [*hardware.note_host_memory(offloaded)]
    assert [len(notes) for notes in (of_ranks, of_a_gpu, of_the_host)] == [is_warned] * 3
    if is_warned:
        assert "2 ranks of 512 MiB" in of_ranks[0] and "--micro-batch-size" in of_ranks[0]
        assert "73 GiB" in of_a_gpu[0] and "80 GiB" in of_a_gpu[0] and "moelpr layouts" in of_a_gpu[0]
        assert "--optimizer-cpu-offload" in of_the_host[0] and "each of 2 ranks" in of_the_host[0]


@pytest.mark.parametrize(
    ("stage", "flags", "ranks"),
    [
        ("stage1", "--micro-batch-size 0", 1),
        ("dense", "", 1),  # on a model with experts
        ("stage1", "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 2),
    ],
)
def test_nothing_is_expected_of_what_the_planner_does_not_support(gathered, stage: str, flags: str, ranks) -> None:
    assert expected_memory(gathered(*flags.split(), stage=stage, ranks=ranks)) is None


@pytest.mark.parametrize(
    ("stage", "flags", "ranks", "layout"),
    [
        ("stage1", "", 2, {"dp": 2}),
        ("stage1", "--use-distributed-optimizer --expert-model-parallel-size 2", 2, {"ep": 2, "dp": 2}),
        ("stage1", "--recompute-granularity selective --recompute-modules moe", 2, {"dp": 2, "recompute": "selective"}),
        ("stage1", "--train-new-embeddings", 1, {}),
        ("stage0", "", 1, {}),
        ("stage2", "--train-everything", 1, {}),
        ("stage1", "--grad-reduce-in-bf16 --bf16", 1, {}),
        ("dense", "", 2, {"dp": 2}),
    ],
)
def test_the_expected_memory_is_the_planners_plus_the_process(
    gathered, upcycled, checkpoint, stage, flags, ranks, layout
) -> None:
    start = checkpoint("dense") if stage == "dense" else upcycled
    spec = ModelSpec.read(Path(start))
    planned = PlannedLayout(**layout, distributed_optimizer="--use-distributed-optimizer" in flags)
    trains = "--train-new-embeddings" in flags, "--train-everything" in flags
    dtype, gradient_bytes = ("bf16", 2) if "bf16" in flags else ("fp32", 4)
    workload = Workload(stage, 32, 6, 12, dtype, CPU, *trains, gradient_bytes=gradient_bytes)
    (rank,) = stage_memories(spec, model_parts(spec), planned, workload)
    run = gathered(*flags.split(), start=start, ranks=ranks, stage=stage)
    assert expected_memory(run) == rank.total_bytes + PROCESS_BYTES
    run.args.stage = None  # as after a wrong name
    assert expected_memory(run) is None
