"""A model's lineage is what each run recorded of its start, and is there when the earlier folders are gone."""

import shutil
from pathlib import Path

import pytest

from checkpoint_convert.conversions.exported_model import mcore_to_hf
from moelpr.model.checkpoints.chain import step_folder
from moelpr.model.checkpoints.lineage import Lineage
from tests.unit.checkpoint_convert.conftest import SETTINGS, write_run


def lineage(checkpoint: str) -> Lineage:
    return Lineage.of(step_folder(Path(checkpoint)))


def test_the_stages_before_stay_known_without_their_folders(runs: Path) -> None:
    shutil.rmtree("stage1")
    shutil.move("stage2", "elsewhere")
    write_run("stage3", "elsewhere", [2, 5], SETTINGS)
    actual = lineage("stage3")
    assert [(stage.folder, stage.step) for stage in actual.stages] == [("stage1", 6), ("elsewhere", 4), ("stage3", 5)]
    assert actual.is_complete and actual.base_model == "Qwen-tiny"
    assert [stage.last["lm_loss"] for stage in actual.stages] == [4.25, 4.5, 4.375]
    assert lineage("upcycled").stages == [] and lineage("upcycled").is_complete


@pytest.mark.parametrize("lost", ["hf/origin.json", "iter_0000004/recipe.yaml recipe.yaml"])
def test_a_lineage_with_a_gap_is_known_as_incomplete(runs: Path, lost: str) -> None:
    """The lineage of a run by an earlier version has no stages."""
    for name in lost.split():
        (Path("stage2") / name).unlink()
    write_run("stage3", "stage2", [2], SETTINGS)
    assert len(lineage("stage3").stages) == 2 and not lineage("stage3").is_complete
    mcore_to_hf(Path("stage3"), Path("export"))
    assert "Training before these stages is not recorded." in Path("export/README.md").read_text()
