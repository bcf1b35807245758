"""A model's history is what its runs recorded, found by the folders that they name."""

import shutil
from pathlib import Path

from checkpoint_convert.card.history import read_history
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.model.checkpoints.chain import BaseCheckpoint
from moelpr.model.families.new_experts import NewExperts
from tests.unit.checkpoint_convert.conftest import SETTINGS, write_run


def test_a_stage_whose_folder_is_gone_is_missing_until_it_is_found(runs: Path) -> None:
    shutil.move("stage1", "elsewhere")
    assert read_history(Path("stage2")).missing == "stage1"
    hf_to_mcore(runs / "Qwen-tiny", Path("stage1"), NewExperts(2))  # another model in its place
    assert read_history(Path("stage2")).missing == "stage1"
    BaseCheckpoint("../elsewhere", "/gone", "iter_0000003", "").write(runs / "stage2")
    assert [stage.step for stage in read_history(Path("stage2")).stages] == [3, 4]


def test_a_resumed_run_is_described_by_its_first_start(runs: Path) -> None:
    write_run("resumed", "stage1", [2, 4], SETTINGS | {"ckpt_step": 3}, resumed=(4,))
    assert [stage.step for stage in read_history(Path("resumed")).stages] == [3, 4]
    shutil.rmtree("resumed/iter_0000002")
    assert read_history(Path("resumed")).missing == "stage1"  # it is not known which of its two steps
    shutil.rmtree("stage1/iter_0000003")
    assert [stage.step for stage in read_history(Path("resumed")).stages] == [6, 4]


def test_a_run_is_described_by_the_step_that_it_started_from_also_if_there_are_later_ones(runs: Path) -> None:
    write_run("after", "stage1", [4], SETTINGS | {"model_step": "iter_0000003"})
    assert [stage.step for stage in read_history(Path("after")).stages] == [3, 4]
    shutil.rmtree("stage1/iter_0000003")
    assert read_history(Path("after")).missing == "stage1"
