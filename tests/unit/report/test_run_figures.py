"""Figures of runs show what their steps recorded."""

from pathlib import Path

import pytest

from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.report.language_results import LanguageResults
from moelpr.report.run_figures import routing_figures
from moelpr.report.runs import read_run
from tests.support.run_folders import make_run
from tests.unit.conftest import SHAPE


def test_routing_before_and_after_review_comes_from_the_runs_own_steps(tmp_path: Path) -> None:
    (figure,) = routing_figures([read_run(make_run(tmp_path / "stage2", "stage2", 200))], LanguageResults())
    assert figure.table.head[1:] == ["original languages", "expanded languages"]
    rows = [row.cells for row in figure.table.full_rows]
    assert [cells[0] for cells in rows if len(cells) == 1] == ["stage2, first steps", "stage2, last steps"]
    first, last = (int(cells[1].removesuffix("%")) for cells in rows if cells[0] == "layer 0")
    assert first == pytest.approx(30 + 60 * 25 / 200, abs=2)
    assert last == pytest.approx(90 - 60 * 25 / 200, abs=2)


def test_layers_have_the_numbers_of_the_model(tmp_path: Path) -> None:
    """With --moe-layers they were numbered from 0."""
    folder = make_run(tmp_path / "stage2", "stage2", 20)
    ModelSpec("qwen2", "bfloat16", SHAPE | {"num_layers": 12}, MoeSpec(4, 2, (1, 4, 9, 11))).write(folder)
    (figure,) = routing_figures([read_run(folder)], LanguageResults())
    assert [row.cells[0] for row in figure.table.full_rows][1:5] == ["layer 1", "layer 4", "layer 9", "layer 11"]
