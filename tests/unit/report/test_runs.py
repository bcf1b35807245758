"""A report of runs: any number of them, running or finished, young, old or long."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from moelpr.errors import UserError
from moelpr.report.__main__ import build
from moelpr.report.curves import Curve, line_chart, thinning_note
from moelpr.report.evaluation import read_evaluations
from moelpr.report.runs import ENDS, read_run
from tests.run_folders import LANGUAGES, make_run


def pages(*folders: Path, evaluations: tuple[Path, ...] = ()) -> tuple[str, str]:
    """HTML and Markdown."""
    page = build(list(folders), list(evaluations), folders[-1])
    return page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    second = make_run(folder / "stage2", "stage2", 200, is_finished=False, train_iters=300)
    return [make_run(folder / "stage1", "stage1", 300), second]


def test_both_pages_tell_what_was_learned_and_forgotten_since_the_start(runs: list[Path]) -> None:
    html, markdown = pages(*runs)
    assert "stage1 finished, stage2 running at step 200 of 300" in html
    for text in (html, markdown):
        assert "English" in text and "Turkish" in text and "held out while training" in text
    row = next(line for line in markdown.splitlines() if line.startswith("| English"))
    start, first, second = (float(number) for number in re.findall(r"\d\.\d{3}", row))
    assert (start, second) == pytest.approx((2.4, 2.434), abs=2e-3)
    assert f"(+{100 * (first / start - 1):.1f}%)" in row


def test_cost_recipe_versions_and_commands_are_there(runs: list[Path]) -> None:
    html, markdown = pages(*runs)
    for text in (html, markdown):
        assert "78,643,200" in text and "41.25 GiB" in text
        assert "torch 2.15.0" in text
        assert "moelpr.pretrain \\\n    --stage stage2 \\\n    --recipe r.yaml" in text
        assert "--nproc-per-node 8" in text
    assert "--save &#x27;runs/a folder&#x27;" in html and "--save 'runs/a folder'" in markdown
    assert "4 warnings during training" in html and "expert 3 of &lt;layer&gt; 1 is idle" in html


def test_the_page_loads_nothing_and_runs_nothing(runs: list[Path]) -> None:
    html, _ = pages(*runs)
    assert not re.search(r"<(script|link|iframe|object|img)\b|@import|url\(|\b(src|href)\s*=", html)


def test_routing_before_and_after_review_is_told_from_the_runs_own_steps(runs: list[Path]) -> None:
    _, markdown = pages(*runs)
    section = markdown.split("## Who answers")[1]
    parts = dict(re.findall(r"\*\*(stage2, \w+ steps)\*\*(.*?)(?=\| \*\*|\n\n)", section, re.DOTALL))
    assert "| original languages | expanded languages |" in section
    first, last = (re.search(r"layer 0 \| (\d+)%", parts[f"stage2, {end} steps"])[1] for end in ("first", "last"))
    assert int(first) == pytest.approx(30 + 60 * 25 / 200, abs=2)
    assert int(last) == pytest.approx(90 - 60 * 25 / 200, abs=2)


def test_the_start_is_that_of_the_first_run_that_scored_it(tmp_path: Path) -> None:
    """A stage 1 without held-out text: what stage 2 starts from must not pass for the base."""
    first = make_run(tmp_path / "stage1", "stage1", 20, languages={})
    second = make_run(tmp_path / "stage2", "stage2", 20)
    _, markdown = pages(first, second)
    assert "| held out while training | before stage2 | after stage2 |" in markdown
    assert "from before stage2 to after stage2" in markdown
    cut = second / "metrics.jsonl"
    cut.write_text("".join(line for line in cut.open() if '"iteration": 0' not in line))
    _, markdown = pages(first, second)
    assert "| held out while training | after stage2 |" in markdown
    assert "%)" not in next(line for line in markdown.splitlines() if line.startswith("| English"))


def test_runs_with_different_languages_stand_in_one_table(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", "stage1", 20, languages={"en": "original", "el": "expanded"})
    second = make_run(tmp_path / "b", "stage2", 20, languages={"en": "original", "sw": "expanded"})
    _, markdown = pages(first, second)
    rows = {line.split(" | ")[0]: line for line in markdown.splitlines() if line.startswith("| ")}
    assert rows["| Greek"].endswith("| – |")
    assert rows["| sw"].count("–") == 2


def test_a_run_of_an_older_version_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    """No recipe, versions, command, memory, token shares or validation; a field nobody knows, an event nobody knows."""
    steps = [{"iteration": step, "lm_loss": 3.0 - step / 10, "tokens": 7} for step in range(1, 6)]
    lines = [json.dumps(record) for record in [*steps, {"iteration": 5, "event": "eclipse"}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 6, "lm_l')
    html, markdown = pages(tmp_path)
    assert "step 5" in html and "Nothing is known per language" in html and "next-token loss" in html
    assert "No command line is on record" in markdown


def test_a_run_without_a_step_or_with_one_is_shown_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "step 0" in pages(tmp_path)[0]
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": null, "step_time_s": 3}\n')
    assert "No curves yet" in pages(tmp_path)[0]


@pytest.mark.parametrize("content", [None, '{"iteration": 1}\nrubbish\n{"iteration": 2}\n'])
def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no folder"):
        read_run(tmp_path / "nowhere")


def test_a_run_that_has_been_silent_for_long_has_stopped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "stage1", 10, is_finished=False, train_iters=20)
    os.utime(folder / "metrics.jsonl", (time.time() - 3600, time.time() - 3600))
    assert read_run(folder).state == "stopped"
    os.utime(folder / "metrics.jsonl")
    assert read_run(folder).state == "running"


def test_an_evaluation_brings_intervals_and_routing_per_language(tmp_path: Path, runs: list[Path]) -> None:
    def result(bits: float) -> dict:
        return {
            "bits_per_byte": {"value": bits, "low": bits - 0.1, "high": bits + 0.2},
            "original_expert_share": {"overall": 0.4, "per_layer": [0.25, None], "layers": [0, 3]},
        }

    models = {"base": {"languages": {"en": result(2.0)}}, "ours": {"languages": {"en": result(1.9)}}}
    models["ours"]["languages"]["en"]["change"] = {"bits_per_byte": {"value": -0.05, "low": -0.06, "high": -0.04}}
    models["base"]["languages"]["el"] = {"bits_per_byte": 3.0}  # as an older version wrote it
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"original_languages": ["en"], "models": models}))
    html, markdown = pages(*runs, evaluations=(file,))
    row = next(line for line in markdown.splitlines() if line.startswith("| English"))
    assert row == "| English | 2.000 \\[1.900, 2.200] | 1.900 \\[1.800, 2.100] (−5.0% \\[−6.0%, −4.0%]) |"
    assert next(line for line in markdown.splitlines() if line.startswith("| Greek")).startswith(
        "| Greek | 3.000 | – |"
    )
    assert "| layer 3 |" in markdown and ">25%<" in html
    file.write_text('{"models": 3}')
    with pytest.raises(UserError, match="is no evaluation"):
        read_evaluations([file])


def test_a_run_of_50000_steps_is_reported_within_10_s_and_3_mb(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", "stage1", 50_000, num_layers=2, languages=LANGUAGES)
    start = time.monotonic()
    html, markdown = pages(folder)
    assert time.monotonic() - start < 10
    assert len(html.encode()) + len(markdown.encode()) < 3_000_000
    assert "Each point stands for up to 125 steps" in html
    run = read_run(folder)
    assert len([record for record in run.metrics.steps if isinstance(record["token_share"], list)]) == 2 * ENDS


def test_a_spike_in_a_thinned_curve_is_still_in_the_band() -> None:
    """Of 5,000 equal steps with one at 9: the mean hides it, the band reaches it."""
    curve = Curve("", list(range(5000)), [9.0 if step == 2500 else 1.0 + step % 2 for step in range(5000)])
    chart = line_chart("loss", [curve])
    (band,) = re.findall(r'd="([^"]*)Z"', chart)
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", band) if pair]
    assert min(heights) < 0 < sorted(heights)[1]  # above the frame, which cuts it off
    assert thinning_note([curve]).startswith("Each point stands for up to 13 steps")
    assert thinning_note([Curve("", [1, 2], [1, 2])]).startswith("Faint: the steps themselves")
