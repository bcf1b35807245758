import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.model.checkpoints.chain import (
    BaseCheckpoint,
    checkpoint_chain,
    checksum,
    step_folder,
    verify_chain,
    verify_step,
    write_checksums,
)
from moelpr.model.model_spec import ModelSpec


def write_checkpoint(folder: Path, spec: ModelSpec, content: dict[str, bytes], base: Path | None = None) -> Path:
    """Write a checkpoint folder with one step of made-up files; returns its step folder."""
    step = folder / ("iter_0000003" if base else "release")
    step.mkdir(parents=True)
    for name, data in content.items():
        (step / name).write_bytes(data)
    write_checksums(step)
    (folder / "latest_checkpointed_iteration.txt").write_text("3" if base else "release")
    spec.write(folder)
    if base:
        BaseCheckpoint.of(base, checksum(base), folder).write(folder)
    return step


@pytest.fixture
def runs(tmp_path: Path, moe_spec: ModelSpec) -> Path:
    """upcycled (complete) <- stage1 <- stage2, in one folder."""
    folder = tmp_path / "runs"
    base = write_checkpoint(folder / "upcycled", moe_spec, {".metadata": b"table", "__0_0.distcp": b"0123456789"})
    stage1 = write_checkpoint(folder / "stage1", moe_spec, {".metadata": b"t1", "__0_0.distcp": b"experts"}, base)
    write_checkpoint(folder / "stage2", moe_spec, {".metadata": b"t2", "__0_0.distcp": b"routers"}, stage1)
    return folder


def test_a_moved_run_finds_its_base_as_a_whole_folder_does(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "far/away").mkdir(parents=True)
    copy = Path(shutil.copytree(runs, tmp_path / "elsewhere"))
    assert checkpoint_chain(copy / "stage2")[1:] == [copy / "stage1/iter_0000003", copy / "upcycled/release"]
    moved = (runs / "stage2").rename(tmp_path / "far/away/stage2")
    assert checkpoint_chain(moved)[1:] == [runs / "stage1/iter_0000003", runs / "upcycled/release"]


def test_a_moved_base_is_found_by_editing_the_file_or_by_an_argument(runs: Path) -> None:
    moved = (runs / "stage1").rename(runs / "old-stage1")
    with pytest.raises(UserError, match=r'iter_0000003 is missing .*"folder" of .*base_checkpoint.json'):
        checkpoint_chain(runs / "stage2")
    assert checkpoint_chain(runs / "stage2", base=moved)[1] == moved / "iter_0000003"
    path = runs / "stage2/base_checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"folder": "../old-stage1"}))
    assert checkpoint_chain(runs / "stage2")[1] == moved / "iter_0000003"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(link=st.sampled_from(["stage1/iter_0000003", "upcycled/release"]), data=st.data())
def test_any_changed_byte_in_a_base_is_detected(runs: Path, link: str, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted((runs / link).iterdir())))
    before = file.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    file.write_bytes(before[:place] + bytes([before[place] ^ data.draw(st.integers(1, 255))]) + before[place + 1 :])

    def verify() -> None:
        verify_chain(links := checkpoint_chain(runs / "stage2"))
        for step in links:
            verify_step(step, {})

    with pytest.raises(UserError, match=f"{link}.*checksum"):
        verify()
    file.write_bytes(before)
    verify()


def test_a_base_with_checksums_is_identified_by_them(tmp_path: Path, moe_spec: ModelSpec) -> None:
    """So it is read once, for its contents."""
    base = write_checkpoint(tmp_path / "upcycled", moe_spec, {".metadata": b"table", "__0_0.distcp": b"0123456789"})
    links = [write_checkpoint(tmp_path / "stage1", moe_spec, {"__0_0.distcp": b"experts"}, base), base]
    (base / "recipe.yaml").touch()  # not part of it
    verify_chain(links)
    verify_step(base, {})
    (base / "__0_0.distcp").write_bytes(b"0123456780")
    with pytest.raises(UserError, match="upcycled/release/__0_0.distcp is damaged"):
        verify_step(base, {})
    write_checksums(base)  # another model, consistent in itself
    with pytest.raises(UserError, match="upcycled/release is not what .*stage1 were trained on"):
        verify_chain(links)


def test_a_base_replaced_together_with_its_recorded_checksum_is_detected(runs: Path, moe_spec: ModelSpec) -> None:
    """Stage 2's record covers stage 1's base too."""
    other = write_checkpoint(runs / "other", moe_spec, {".metadata": b"table", "__0_0.distcp": b"9876543210"})
    BaseCheckpoint.of(other, checksum(other), runs / "stage1").write(runs / "stage1")
    verify_chain(checkpoint_chain(runs / "stage1"))
    with pytest.raises(UserError, match="checksum"):
        verify_chain(checkpoint_chain(runs / "stage2"))


def test_a_base_without_checksums_is_an_error_unless_it_is_trusted(runs: Path) -> None:
    (runs / "upcycled/release/checksums.json").unlink()
    links = checkpoint_chain(runs / "stage2")
    with pytest.raises(UserError, match="upcycled/release has no checksums.json"):
        verify_chain(links)
    verify_chain(links, Verify.NONE)


def test_a_circular_chain_is_rejected(runs: Path) -> None:
    BaseCheckpoint.of(runs / "stage2/iter_0000003", "0", runs / "stage1").write(runs / "stage1")
    with pytest.raises(UserError, match="base_checkpoint.json is circular"):
        checkpoint_chain(runs / "stage2")


def test_a_base_of_another_model_is_rejected(runs: Path, moe_spec: ModelSpec) -> None:
    replace(moe_spec, dtype="bfloat16").write(runs / "upcycled")
    with pytest.raises(UserError, match="upcycled contains another model than .*stage2"):
        checkpoint_chain(runs / "stage2")


def test_a_base_whose_step_is_no_step_is_a_user_error(runs: Path) -> None:
    text = '{"format_version": 1, "folder": "a", "absolute_folder": "b", "step": "../../x", "sha256": "c"}'
    (runs / "stage2/base_checkpoint.json").write_text(text)
    with pytest.raises(UserError, match="base_checkpoint.json.*got '../../x'"):
        checkpoint_chain(runs / "stage2")


def test_a_step_is_chosen_by_the_tracker_or_by_number(runs: Path) -> None:
    assert step_folder(runs / "stage1").name == "iter_0000003"
    (runs / "stage1/iter_0000001").mkdir()
    assert step_folder(runs / "stage1", 1).name == "iter_0000001"
    assert checkpoint_chain(runs / "stage1", 1)[1] == runs / "upcycled/release"
    with pytest.raises(UserError, match="iteration 2; pass --iteration 1 or 3 "):
        step_folder(runs / "stage1", 2)
    (runs / "stage1/latest_checkpointed_iteration.txt").write_bytes(b"\xf9")
    with pytest.raises(UserError, match="latest_checkpointed_iteration.txt must contain"):
        step_folder(runs / "stage1")
