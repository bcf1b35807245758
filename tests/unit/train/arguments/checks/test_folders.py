import os
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelpr.model.model_spec import ModelSpec
from moelpr.train.arguments.checks.folders import checkpoint_bytes


def test_an_empty_folder_to_load_is_rejected(upcycled: str, problems, tmp_path: Path) -> None:
    (actual,) = problems("stage1", upcycled, "--load", str(tmp_path / "typo"), "--save", str(tmp_path / "run"))
    assert actual.startswith(f"--load {tmp_path}/typo ") and upcycled in actual


@pytest.mark.parametrize("flag", ["--load", "--finetune"])
def test_a_run_is_not_started_over_the_checkpoints_of_another(make_checkpoint, problems, accepted, flag: str) -> None:
    run, other = make_checkpoint("run", stage="stage1"), make_checkpoint("other", stage="stage1")
    start = [flag, other] if flag == "--load" else [flag]
    (actual,) = problems("stage1", None, "--save", run, *start)
    assert actual.startswith(f"--save {run} ") and f"remove {flag}" in actual
    new = f"{run}-new"
    assert accepted("stage1", other, "--save", new, "--load", run)["is_resumed"]
    assert not accepted("stage1", other, "--save", new, "--load", run, "--finetune")["is_resumed"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 128 KiB, empty."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_for_a_checkpoint_is_rejected(upcycled: str, problems, small_disk: Path) -> None:
    (actual,) = problems("stage1", upcycled, "--save", str(small_disk / "runs" / "new"))
    assert actual.startswith(f"--save {small_disk}/runs/new ")
    assert "128 KiB free" in actual and "about 761.2 KiB" in actual and "--save-trained-only" in actual
    (small_disk / "other").write_bytes(bytes(128 * 1024))
    (actual,) = problems("stage2", upcycled, "--save", str(small_disk / "run"), "--save-trained-only")
    assert "0 bytes free" in actual
    assert "--save-trained-only" not in actual


def test_a_read_only_disk_is_rejected(upcycled: str, problems, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    actual = problems("stage1", upcycled, "--save", str(small_disk / "run"))
    assert f"--save {small_disk}/run" in actual[0] and f"{small_disk} is read-only" in actual[0]


def test_a_folder_without_write_permission_is_rejected(upcycled: str, problems, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / "order.npy").touch()
    (actual,) = problems("stage1", upcycled, "--save", str(tmp_path / "run"), "--data-cache-path", str(tmp_path))
    assert f"--save {tmp_path}/run" in actual and "permission" in actual


def test_a_file_in_place_of_a_folder_is_named(upcycled: str, problems, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    (actual,) = problems("stage1", upcycled, "--save", str(tmp_path / "notes" / "run"))
    assert f"--save {tmp_path}/notes/run" in actual and f"{tmp_path}/notes is a file" in actual


def test_a_disk_that_reports_no_size_is_accepted(upcycled: str, accepted, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    accepted("stage1", upcycled, "--save", str(tmp_path / "run"))


def test_a_checkpoint_contains_the_weights_and_the_optimizer_state_of_what_is_trained(moe_spec: ModelSpec) -> None:
    """Three layers: hidden 32, FFN 48, 4 heads and 2 groups of 8, 5 experts, vocabulary 128, tied."""
    experts, routers, attention, norms = 3 * 5 * 3 * 32 * 48, 3 * 5 * 32, 3 * (64 * 32 + 64 + 32 * 32), 7 * 32
    new, full = experts // 5 * 4, 128 * 32 + experts + routers + attention + norms

    def size(stage: str, bf16: bool = True, **others: bool) -> int:
        names = "fp16 train_everything train_new_embeddings save_trained_only no_save_optim use_distributed_optimizer"
        flags = dict.fromkeys(names.split(), False) | others
        return checkpoint_bytes(Namespace(stage=stage, bf16=bf16, **flags), moe_spec)

    assert size("stage1") == full * 2 + (new + routers) * 12
    assert size("stage1", bf16=False) == full * 4 + (new + routers) * 8
    assert size("stage1", bf16=False, use_distributed_optimizer=True) == full * 4 + (new + routers) * 12
    assert size("stage2") == full * 2 + routers * 12
    assert size("stage2", save_trained_only=True) == routers * 14
    assert size("stage2", no_save_optim=True) == full * 2
    assert size("stage1", train_everything=True) == full * 14
    assert size("stage0", save_trained_only=True) == 128 * 32 * 14
    assert size("stage1", train_new_embeddings=True) == full * 2 + (new + routers + 128 * 32) * 12
