"""The report of runs: any number of them, running or finished, young, old or long."""

import json
import re
import time
from pathlib import Path

import pytest

from moelpr.measure.report.findings import Calibration
from moelpr.measure.report.language_results import LanguageResults, read_evaluations
from moelpr.measure.report.run_figures import routing_figures
from moelpr.measure.report.run_report import Report
from moelpr.measure.report.runs import read_run
from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.support.run_folders import LANGUAGES, make_run
from tests.unit.conftest import SHAPE


def pages(*folders: Path, evaluations: tuple[Path, ...] = (), **more: object) -> tuple[str, str]:
    """HTML and Markdown."""
    report = Report([read_run(folder) for folder in folders], read_evaluations(evaluations), **more)
    page = report.write(folders[-1])
    return page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")


def row_of(markdown: str, name: str) -> list[str]:
    """The cells of the first table row whose first cell is `name`."""
    row = next(line for line in markdown.splitlines() if re.match(rf"\| {re.escape(name)} +\|", line))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    second = make_run(folder / "stage2", "stage2", 200, is_finished=False, train_iters=300)
    return [make_run(folder / "stage1", "stage1", 300), second]


@pytest.fixture(scope="module")
def written(runs: list[Path]) -> tuple[str, str]:
    return pages(*runs)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    def result(bits: float) -> dict:
        return {
            "bits_per_byte": {"value": bits, "low": bits - 0.1, "high": bits + 0.2},
            "layers": [0, 3],
            "original_first_share": [0.25, None],
            "all_original_share": [0.125, 0.5],
        }

    change = {"bits_per_byte": {"value": -0.05, "low": -0.06, "high": -0.04}}
    score = {"value": 52.5, "low": None, "high": None, "change": {"value": 2.5, "low": 1.0, "high": 4.0}}
    models = {
        "base": {
            "languages": {"en": result(2.0), "el": {"bits_per_byte": {"value": 3.0}}},
            "scores": {"ARC": {"el": {"value": 50.0, "low": 45.0, "high": 55.0}}},
        },
        "ours": {"languages": {"en": result(1.9) | {"change": change}}, "scores": {"ARC": {"el": score}}},
    }
    sample = {"prompt": "Hello", "reference": "<world>", "by_model": {"base": "&", "ours": ""}}
    rate = {"rate": {"value": 0.25, "low": 0.1, "high": 0.5}, "decided": 16, "undecided": 4}
    wrong = {"base": rate, "the text itself": {"rate": {"value": None}, "decided": 0, "undecided": 20}}
    content = {"original_languages": ["en"], "models": models, "continuations": {"en": sample}}
    (tmp_path / "evaluation.json").write_text(json.dumps(content | {"wrong_language": {"en": wrong}}))
    return tmp_path / "evaluation.json"


def test_both_pages_show_what_was_learned_and_what_it_cost(written: tuple[str, str]) -> None:
    html, markdown = written
    for part in ("Turkish", "78,643,200", "41.25 GiB", "torch 2.15.0", "--nproc-per-node 8"):
        assert part in html and part in markdown
    start, first, second = (float(cell.split()[0]) for cell in row_of(markdown, "English")[1:])
    assert (start, second) == pytest.approx((2.4, 2.434), abs=2e-3)
    assert row_of(markdown, "English")[2].endswith(f"(+{100 * (first / start - 1):.1f}%)")
    assert "--save &#39;runs/a folder&#39;" in html and "--save 'runs/a folder'" in markdown
    assert "expert 3 of &lt;layer&gt; 1 is idle" in html


def test_without_a_start_there_are_no_changes(tmp_path: Path) -> None:
    first = make_run(tmp_path / "stage1", "stage1", 20, languages={})
    second = make_run(tmp_path / "stage2", "stage2", 20)
    _, markdown = pages(first, second)
    assert row_of(markdown, "held out while training")[1:] == ["before stage2", "after stage2"]
    metrics = second / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"iteration": 0' not in line))
    _, markdown = pages(first, second)
    assert row_of(markdown, "held out while training")[1:] == ["after stage2"]
    assert "%" not in row_of(markdown, "English")[1]


def test_run_of_an_older_version_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    """No recipe, versions, command, memory, token shares or validation; an unknown field and an unknown event."""
    steps = [{"iteration": step, "lm_loss": 3.0 - step / 10, "tokens": 7} for step in range(1, 6)]
    lines = [json.dumps(record) for record in [*steps, {"iteration": 5, "event": "eclipse"}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 6, "lm_l')
    html, markdown = pages(tmp_path)
    assert "step 5" in html and "no results per language" in html and "next-token loss" in html
    assert "No command line was recorded" in markdown
    # And a run without steps, or with one.
    for content, expected in (
        ("", "step 0"),
        ('{"iteration": 1, "lm_loss": null, "step_time_s": 3}\n', "no curves yet"),
    ):
        (tmp_path / "metrics.jsonl").write_text(content)
        assert expected in pages(tmp_path)[0]


def test_evaluation_adds_intervals_routing_and_continuations(runs: list[Path], evaluation: Path) -> None:
    html, markdown = pages(*runs, evaluations=(evaluation,))
    change = "1.900 [1.800, 2.100] (\u22125.0% [\u22126.0%, \u22124.0%])"
    assert row_of(markdown, "English")[1:] == ["2.000 [1.900, 2.200]", change]
    assert row_of(markdown, "Greek")[1:] == ["3.000", "–"]
    assert row_of(markdown, "layer 3") and ">25%<" in html
    assert "| 25% [10%, 50%] of 16 | – (none of 20 identified) |" in markdown
    assert "| Greek | 50.0 [45.0, 55.0] | 52.5; +2.50 [+1.00, +4.00] |" in markdown
    assert "&lt;world&gt;" in html and "(nothing)" in html and "Change in bits per byte" in html


def test_routers_in_closed_form_are_shown_with_their_ends_and_texts(runs: list[Path], tmp_path: Path) -> None:
    text = {"shares": [0.25, 0.75], "all_original": 0.125}
    texts = {"el": text | {"losses": [3.0, 2.0, 2.1]}, "fi": text | {"distance": 0.0625, "change": 0.04}}
    ends = {name: {"distance": 0.5, "loss": loss} for name, loss in (("base", 3.0), ("learned", 2.0), ("result", 2.1))}
    rest = {"kept": 0.9, "tried": [], "shares": [], "max_distance": None, "keep": None}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"findings": ends | rest | {"texts": texts}, "experts": {"ffn-hf": ["el"]}}))
    _, markdown = pages(*runs, routers=Calibration.read(path))
    assert "90.0%" in markdown and row_of(markdown, "result")[1:] == ["0.500", "2.100"]
    assert row_of(markdown, "el")[1:] == ["25.0%", "75.0%", "12.5%", "", "", "3.000", "2.000", "2.100"]
    assert row_of(markdown, "fi")[4:6] == ["0.062", "+4.0%"]


def test_report_json_has_every_number(runs: list[Path], evaluation: Path) -> None:
    pages(*runs, evaluations=(evaluation,))
    content = json.loads((runs[-1] / "report.json").read_text(encoding="utf-8"))
    assert content["languages"] == {"en": "original", "el": "expanded"}
    assert content["bits_per_byte"]["ours"]["en"] == pytest.approx({"value": 1.9, "low": 1.8, "high": 2.1})
    assert content["change"]["ours"]["en"] == {"value": -0.05, "low": -0.06, "high": -0.04}
    assert content["routing"]["original_expert_share"]["ours"]["en"] == {"overall": 0.25, "per_layer": [0.25, None]}
    assert content["routing"]["all_original_share"]["ours"]["en"] == [0.125, 0.5]
    assert "choices are all original experts" in (runs[-1] / "report.md").read_text(encoding="utf-8")
    assert content["runs"]["stage1"]["tokens"] == 78_643_200 and content["runs"]["stage2"]["state"] == "running"
    assert content["held_out"]["before stage1"]["en"]["value"] == pytest.approx(2.4)
    assert content["continuations"]["en"]


def test_run_of_50000_steps_is_reported_within_10_s_and_3_mb(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", "stage1", 50_000, num_layers=2, languages=LANGUAGES)
    start = time.process_time()
    html, markdown = pages(folder)
    assert time.process_time() - start < 10
    assert len(html.encode()) + len(markdown.encode()) < 3_000_000
    assert "Each point represents up to 125 steps" in html


def test_windows_of_another_length_are_not_compared(tmp_path: Path) -> None:
    """The paper's recipes have 1,024 and 512 tokens; a shorter window alone costs several percent."""
    first, second = (make_run(tmp_path / name, name, 20) for name in ("stage1", "stage2"))
    recipe = first / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seq_length: 512", "seq_length: 1024"))
    _, markdown = pages(first, second)
    assert "%" in row_of(markdown, "English")[-2] and "%" not in row_of(markdown, "English")[-1]


def test_routing_before_and_after_review_comes_from_the_runs_own_steps(tmp_path: Path) -> None:
    """With --moe-layers, layers were numbered from 0."""
    folder = make_run(tmp_path / "stage2", "stage2", 200)
    ModelSpec("qwen2", "bfloat16", SHAPE | {"num_layers": 12}, MoeSpec(4, 2, (1, 4, 9, 11))).write(folder)
    (figure,) = routing_figures([read_run(folder)], LanguageResults())
    assert figure.table.head[1:] == ["original languages", "expanded languages"]
    rows, layers = [row.cells for row in figure.table.full_rows], [f"layer {number}" for number in (1, 4, 9, 11)]
    assert [cells[0] for cells in rows] == ["stage2, first steps", *layers, "stage2, last steps", *layers]
    first, last = (int(cells[1].removesuffix("%")) for cells in rows if cells[0] == "layer 1")
    assert first == pytest.approx(30 + 60 * 25 / 200, abs=2)
    assert last == pytest.approx(90 - 60 * 25 / 200, abs=2)
