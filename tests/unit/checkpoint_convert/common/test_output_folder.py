"""Outputs appear complete or not at all, and an interrupted conversion resumes to the same bytes."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from torch import Tensor

from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.grafted_model import graft
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.hf.hub import Model
from checkpoint_convert.hf.safetensors_reader import HfReader
from moelpr.base.errors import UserError
from moelpr.base.journal import JOURNAL_FILE
from moelpr.model.checkpoints.torch_dist import TorchDistWriter
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec
from tests.support.hf_models import files_of

Convert = Callable[[Path], object]


@pytest.fixture
def conversions(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Convert]:
    """All directions, in files of a few tensors."""
    monkeypatch.setattr(TorchDistWriter.__init__, "__defaults__", (None, 30_000))
    hf_to_mcore(qwen2, tmp_path / "source", NewExperts(4))
    mcore_to_hf(tmp_path / "source", tmp_path / "export")
    models = [Model(folder, folder.name) for folder in (qwen2, qwen2, tmp_path / "export")]
    return {
        "import": lambda save: hf_to_mcore(qwen2, save, NewExperts(4), start=Start(noise=0.1)),
        "export": lambda save: mcore_to_hf(tmp_path / "source", save, max_shard_bytes=30_000),
        "graft": lambda save: graft(*models, save, max_shard_bytes=9_000),  # type: ignore[call-arg]
    }


WEIGHTS = (".distcp", ".safetensors")


@contextmanager
def interrupted_after(num_reads: int) -> Iterator[list[str]]:
    """Ctrl-C at a read; yields the names read until then."""
    reads: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for reader in (HfReader, MegatronReader):

            def read(self, name: str, real: Callable = reader.read) -> Tensor:
                if len(reads) == num_reads:
                    raise KeyboardInterrupt
                reads.append(name)
                return real(self, name)

            patch.setattr(reader, "read", read)
        yield reads


@pytest.mark.parametrize("direction", ["import", "export", "graft"])
def test_an_interrupted_conversion_resumes_to_the_same_bytes(conversions, tmp_path, direction) -> None:
    convert = conversions[direction]
    convert(tmp_path / "unbroken")
    partial = tmp_path / ".broken.partial"
    for num_reads in (20, 12, 9):  # several interruptions, the second soon after the first
        with interrupted_after(num_reads), pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "broken")
        assert not (tmp_path / "broken").exists() and partial.is_dir()
        with open(partial / JOURNAL_FILE, "a") as journal:
            journal.write('{"name": "__0_')  # killed within a line
    with interrupted_after(10**9) as reads:
        convert(tmp_path / "broken")
    with interrupted_after(10**9) as all_reads:
        convert(tmp_path / "again")
    assert 0 < len(reads) <= len(all_reads) - 20
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "unbroken")
    assert not partial.exists()


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_conversion_resumes_on_a_disk_with_room_for_what_is_missing(conversions, tmp_path, monkeypatch, direction):
    conversions[direction](tmp_path / "unbroken")
    whole = sum(path.stat().st_size for path in tmp_path.glob("unbroken/**/*.*") if path.suffix in WEIGHTS)
    with interrupted_after(30), pytest.raises(KeyboardInterrupt):
        conversions[direction](tmp_path / "out")
    written = sum(path.stat().st_size for path in tmp_path.glob(".out.partial/**/*.*") if path.suffix in WEIGHTS)
    assert written > whole / 8
    for free, end in ((1000, pytest.raises(OSError, match="No space left")), (whole - written, nullcontext())):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(whole, 0, free))
        with end:
            conversions[direction](tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "unbroken")


def test_only_the_same_job_resumes(conversions: dict[str, Convert], qwen2: Path, tmp_path: Path) -> None:
    with interrupted_after(30), pytest.raises(KeyboardInterrupt):
        conversions["import"](tmp_path / "out")
    hf_to_mcore(qwen2, tmp_path / "out", NewExperts(2))
    hf_to_mcore(qwen2, tmp_path / "expected", NewExperts(2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_existing_output_is_replaced_only_with_overwrite(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4))
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(2))
    assert files_of(tmp_path) == before
    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(2), overwrite=True)
    assert ModelSpec.read(tmp_path / "megatron").moe.num_new_experts == 2


def test_overwrite_never_deletes_a_folder_of_another_kind_or_the_input(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    before = files_of(tmp_path)
    for save in (tmp_path / "home", source, source.parent, source / "inside"):
        with pytest.raises(UserError, match="(home|source).*--save"):
            hf_to_mcore(source, save, NewExperts(4), overwrite=True)
    assert files_of(tmp_path) == before
