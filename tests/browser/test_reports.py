"""Reports in Chromium: every chart is drawn, the console is empty, nothing is wider than the screen.

Screenshots are kept in the folder that REPORT_SCREENSHOTS names: look at them after a change.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moelpr.measure.report.language_results import read_evaluations
from moelpr.measure.report.run_report import Report
from moelpr.measure.report.runs import read_run
from tests.browser.browser import look, opened
from tests.support.run_folders import LANGUAGES, make_run

pytest.importorskip("playwright", reason="run by `make test-browser` in .venv-browser")
PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(folder / "stage1", "stage1", 1500, num_layers=8),
        make_run(folder / "stage2", "stage2", 420, num_layers=8, is_finished=False, train_iters=600),
    ]
    young = make_run(folder / "young", "stage1", 3, languages={})
    evaluation = folder / "evaluation.json"
    evaluation.write_text(json.dumps(made_up_evaluation()))
    results = read_evaluations([evaluation])
    return {
        "runs": Report([read_run(run) for run in runs], results).write(folder / "runs"),
        "young": Report([read_run(young)]).write(folder / "young"),
        "demo": Report([read_run(young)], results).write(folder / "demo"),
    }


def made_up_evaluation() -> dict:
    def result(base: float, change: float) -> dict:
        bits = base * (1 + change)
        return {
            "bits_per_byte": {"value": bits, "low": bits - 0.04, "high": bits + 0.05},
            "change": {"bits_per_byte": {"value": change, "low": change - 0.01, "high": change + 0.01}},
            "layers": [*range(8)],
            "original_first_share": [0.1 * layer for layer in range(8)],
        }

    changes = {"base": 0.0, "full_finetune": 0.5, "stage1": 0.2, "stage2": -0.005}
    models = {model: {"languages": dict.fromkeys(LANGUAGES, result(2.5, change))} for model, change in changes.items()}
    samples = {
        "el": {"prompt": "Η πόρτα του σπιτιού", "reference": "είναι ανοιχτή.", "by_model": {"base": "και"}},
        "zh": {"prompt": "有人晚回家时", "reference": "开灯", "by_model": {"base": "，", "stage2": "开灯"}},
    }
    original = [name for name, group in LANGUAGES.items() if group == "original"]
    return {"original_languages": original, "models": models, "continuations": samples}


@pytest.mark.parametrize("name", ["runs", "young", "demo"])
@pytest.mark.parametrize(
    ("kind", "width", "is_dark"), [("phone", PHONE, False), ("desktop", DESKTOP, False), ("dark", DESKTOP, True)]
)
def test_every_chart_is_drawn_and_the_console_is_empty(pages, name, kind, width, is_dark, tmp_path) -> None:
    seen = look(pages[name], width, is_dark, picture := tmp_path / f"{name}-{kind}.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    if kept := os.environ.get("REPORT_SCREENSHOTS"):
        shutil.copytree(tmp_path, kept, dirs_exist_ok=True)
    assert faults(seen) == []
    assert len(seen["charts"]) == {"runs": 25, "young": 8, "demo": 13}[name]
    assert seen["width"] == width
    assert brightness(seen["paper"]) < 60 if is_dark else brightness(seen["paper"]) > 240
    assert abs(brightness(seen["ink"]) - brightness(seen["paper"])) > 150


def faults(seen: dict[str, Any]) -> list[str]:
    actual = [f"console: {message}" for message in seen["complaints"]]
    if seen["page_width"] > seen["width"]:
        actual.append(f"the page is {seen['page_width']} wide on {seen['width']}")
    counts = {"tables are cut off": seen["scrolled"], "IDs are not unique": seen["repeated_ids"]}
    actual += [f"{number} {what}" for what, number in counts.items() if number]
    for chart in seen["charts"]:
        if not (chart["width"] > 100 and chart["height"] > 100 and chart["shapes"] > 10):
            actual.append(f"{chart['title']} is not drawn: {chart}")
        if chart["empty"] or chart["cut_off"]:
            actual.append(f"{chart['title']}: {chart['empty']} empty shapes, cut off: {chart['cut_off']}")
    return actual


def brightness(colour: str) -> float:
    """0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_faults_of_a_broken_page_are_found(pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["young"].read_text(encoding="utf-8")
    for old, new, fault in [
        (' d="M', ' d="Mnan ', "console"),
        ("<h1>", '<h1 id="a"><i id="a"></i>', "not unique"),
        ("</h1>", '</h1><div style="width:2000px">wide</div>', "wide on"),
        ("</h1>", "</h1><script>undefined_function()</script>", "console"),
        ("<td", '<td style="min-width:2000px"', "tables are cut off"),
        ("</text>", " with a label that is far too long for any chart of this page to show</text>", "cut off"),
    ]:
        broken = tmp_path / "broken.html"
        broken.write_text(text.replace(old, new, 1), encoding="utf-8")
        assert any(fault in actual for actual in faults(look(broken, DESKTOP))), fault


def test_every_page_can_be_printed(pages: dict[str, Path]) -> None:
    for page in pages.values():
        with opened(page.resolve().as_uri(), DESKTOP) as (shown, *_):
            assert 1 <= len(re.findall(rb"/Type\s*/Page\b", shown.pdf(format="A4"))) <= 9
