"""GPUs that PyTorch cannot use are an error, little memory is a warning."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moelpr.megatron_patches import cpu
from moelpr.process import machine


@pytest.mark.parametrize(
    ("cuda", "message"), [("13.2", "NVIDIA's driver is too old for CUDA 13.2"), (None, "is built without CUDA")]
)
def test_gpus_that_pytorch_cannot_use_are_an_error_unless_they_are_hidden(
    gathered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str
) -> None:
    from moelpr.arguments.checks import find_problems

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
    from moelpr.arguments.checks import hardware

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(hardware, "expected_memory", lambda run: 1 << 29)
    monkeypatch.setattr(machine, "free_memory", lambda: int(free_gib * 2**30))
    notes = list(hardware.note_memory(gathered(ranks=2)))
    assert len(notes) == is_warned
    assert not notes or ("MiB" in notes[0] and "--micro-batch-size 3" in notes[0])


@pytest.mark.parametrize(("need_gib", "is_warned"), [(71, False), (73, True)])
def test_a_rank_that_may_not_fit_its_gpu_is_a_warning(gathered, monkeypatch, need_gib: int, is_warned: bool) -> None:  # noqa: ANN001
    from moelpr.arguments.checks import hardware

    run = gathered()
    monkeypatch.setattr(cpu, "is_needed", lambda: False)
    monkeypatch.setattr(hardware, "expected_memory", lambda run: need_gib << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = {0: 94 << 30, 1: 80 << 30}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu]))
    notes = list(hardware.note_memory(run))
    assert len(notes) == is_warned
    assert not notes or ("73 GiB" in notes[0] and "80 GiB" in notes[0] and "moelpr.plan" in notes[0])
