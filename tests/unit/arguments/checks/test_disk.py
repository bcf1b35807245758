"""A disk that can't take a checkpoint is named before anything is built."""

import os
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelpr.arguments.checks.disk import checkpoint_bytes
from moelpr.model_spec import ModelSpec


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


def test_a_disk_without_room_for_a_checkpoint_is_refused(upcycled: str, refused, small_disk: Path) -> None:
    (said,) = refused("stage1", upcycled, "--save", str(small_disk / "runs" / "new"))
    assert said.startswith(f"--save {small_disk}/runs/new is on a disk with 128 KiB free, and a checkpoint of this run")
    assert said.endswith(
        "takes about 761.2 KiB; free some space, save less with --save-trained-only, or name a folder on another disk"
    )


def test_a_full_disk_is_refused(upcycled: str, refused, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(128 * 1024))
    (said,) = refused("stage2", upcycled, "--save", str(small_disk / "run"), "--save-trained-only")
    assert "is on a disk with 0 bytes free" in said
    assert said.endswith("KiB; free some space, or name a folder on another disk")


def test_a_read_only_disk_is_refused(upcycled: str, refused, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = refused("stage1", upcycled, "--save", str(small_disk / "run"))
    assert said[0] == (
        f"--save {small_disk}/run can't be written: the disk of {small_disk} is read-only; name a folder on another "
        "disk, or mend that"
    )


def test_a_folder_without_permission_is_refused(upcycled: str, refused, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (said,) = refused("stage1", upcycled, "--save", str(tmp_path / "run"))
    assert said.startswith(f"--save {tmp_path}/run can't be written: no permission to write in {tmp_path}; name")


def test_a_file_in_the_way_is_named(upcycled: str, refused, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    (said,) = refused("stage1", upcycled, "--save", str(tmp_path / "notes" / "run"))
    assert said == f"--save {tmp_path}/notes/run can't be made: {tmp_path}/notes is a file; name another folder"


def test_a_store_without_a_size_is_taken(upcycled: str, accepted, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    accepted("stage1", upcycled, "--save", str(tmp_path / "run"))


def test_a_checkpoint_is_the_weights_and_what_the_optimizer_keeps_of_what_is_trained(moe_spec: ModelSpec) -> None:
    """Three layers: hidden 32, FFN 48, 4 heads and 2 groups of 8, 5 experts, vocabulary 128, tied."""
    experts = 3 * 5 * 3 * 32 * 48
    new = experts // 5 * 4
    routers = 3 * 5 * 32
    attention = 3 * (64 * 32 + 64 + 32 * 32)
    norms = 7 * 32
    whole = 128 * 32 + experts + routers + attention + norms

    def size(stage: str, bf16: bool = True, **others: bool) -> int:
        names = ("fp16", "train_everything", "save_trained_only", "no_save_optim", "use_distributed_optimizer")
        flags = dict.fromkeys(names, False) | others
        return checkpoint_bytes(Namespace(stage=stage, bf16=bf16, **flags), moe_spec)

    assert size("stage1") == whole * 2 + (new + routers) * 12
    assert size("stage1", bf16=False) == whole * 4 + (new + routers) * 8
    assert size("stage1", bf16=False, use_distributed_optimizer=True) == whole * 4 + (new + routers) * 12
    assert size("stage2") == whole * 2 + routers * 12
    assert size("stage2", save_trained_only=True) == routers * 14
    assert size("stage2", no_save_optim=True) == whole * 2
    assert size("stage1", train_everything=True) == whole * 14
