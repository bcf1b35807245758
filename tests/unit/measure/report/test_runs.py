import json
import math
import os
import time
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.measure.report.runs import curve_of, read_run, read_runs
from tests.support.run_folders import make_run


def test_a_run_whose_start_is_not_recorded_can_be_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "stage1", 3, languages={})
    (folder / "command.json").write_text(json.dumps({"arguments": 3, "num_ranks": 2}))
    (folder / "versions.json").write_text("[" * 100_000)
    run = read_run(folder)
    assert (run.arguments, run.num_ranks, run.versions) == ([], None, {})


def test_curve_takes_finite_numbers_and_means_of_layers() -> None:
    values = [1.0, None, math.nan, [0.5, None, 1.0], math.inf, "x"]
    curve = curve_of([{"iteration": step, "loss": value} for step, value in enumerate(values)], "loss", "name")
    assert (curve.name, list(curve.x), list(curve.y)) == ("name", [0, 3], [1.0, 0.75])


@pytest.mark.parametrize("content", [None, '{"iteration": 1}\nrubbish\n{"iteration": 2}\n'])
def test_folder_that_is_not_a_run_is_rejected(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere; pass a run folder .*--save"):
        read_run(tmp_path / "nowhere")


def test_run_that_has_been_silent_for_long_has_stopped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "stage1", 10, is_finished=False, train_iters=20)
    os.utime(folder / "metrics.jsonl", (time.time() - 3600, time.time() - 3600))
    assert read_run(folder).state == "stopped"
    os.utime(folder / "metrics.jsonl")
    assert read_run(folder).state == "running"


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """The second took the place of the first."""
    folders = [make_run(tmp_path / name, "stage1", 3, languages={}) for name in ("a/x/stage1", "b/x/stage1", "stage2")]
    assert [run.name for run in read_runs(folders)] == ["a/x/stage1", "b/x/stage1", "stage2"]
    with pytest.raises(UserError, match="stage2 is named twice"):
        read_runs([*folders, tmp_path / "a" / ".." / "stage2"])
