"""Reports in Chromium: every chart drawn, nothing complained of, nothing wider than the screen.

Screenshots are kept in the folder that REPORT_SCREENSHOTS names: look at them after a change.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from moelpr.report.__main__ import build
from moelpr.report.demo import Continuation, Report, write_report
from tests.browser.browser import Seen, look, missing_programs, print_pages, screenshot
from tests.run_folders import LANGUAGES, make_run

pytestmark = pytest.mark.browser

PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module", autouse=True)
def browser() -> None:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)} here; `make test-browser` installs Debian's packages")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(folder / "stage1", "stage1", 1500, num_layers=8),
        make_run(folder / "stage2", "stage2", 420, num_layers=8, is_finished=False, train_iters=600),
    ]
    evaluation = folder / "evaluation.json"
    evaluation.write_text(json.dumps(made_up_evaluation()))
    return {
        "runs": build(runs, [evaluation], folder / "runs"),
        "young": build([make_run(folder / "young", "stage1", 3, languages={})], [], folder / "young"),
        "demo": write_report(folder / "demo", made_up_demo()),
    }


def made_up_evaluation() -> dict:
    def result(language: str, base: float, change: float) -> dict:
        bits = base * (1 + change)
        return {
            "bits_per_byte": {"value": bits, "low": bits - 0.04, "high": bits + 0.05},
            "change": {"bits_per_byte": {"value": change, "low": change - 0.01, "high": change + 0.01}},
            "original_expert_share": {"overall": 0.4, "per_layer": [0.1 * layer for layer in range(8)]},
        }

    models = {"base": 0.0, "stage1": 0.2, "stage2": -0.05}
    return {
        "original_languages": [name for name, group in LANGUAGES.items() if group == "original"],
        "models": {
            model: {"languages": {language: result(language, 2.5, change) for language in LANGUAGES}}
            for model, change in models.items()
        },
    }


def made_up_demo() -> Report:
    factors = {"base": (1.0, 1.0), "full_finetune": (1.5, 0.8), "stage1": (1.3, 0.9), "stage2": (1.01, 0.92)}
    bits = {
        model: {
            name: (2.0 + 0.1 * number) * factor[group == "expanded"]
            for number, (name, group) in enumerate(LANGUAGES.items())
        }
        for model, factor in factors.items()
    }
    share = {name: {"overall": 0.5, "per_layer": [0.1 * layer for layer in range(6)]} for name in LANGUAGES}
    return Report(
        languages=LANGUAGES,
        bits_per_byte=bits,
        original_expert_share={"stage1": share, "stage2": share},
        checks={"frozen_max_abs_diff": 0.0},
        continuations={
            "el": Continuation("Η πόρτα του σπιτιού", "είναι ανοιχτή.", {"base": "και", "stage2": "είναι ανοιχτή"}),
            "zh": Continuation("有人晚回家时", "开灯", {"base": "，", "stage2": "开灯"}),
        },
    )


@pytest.mark.parametrize("name", ["runs", "young", "demo"])
@pytest.mark.parametrize(("width", "is_dark"), [(PHONE, False), (DESKTOP, False), (DESKTOP, True)])
def test_every_chart_is_drawn_and_nothing_is_complained_of(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, is_dark: bool
) -> None:
    seen = look(pages[name], tmp_path, width, is_dark)
    assert faults(seen) == []
    assert len(seen.found["charts"]) == {"runs": 23, "young": 8, "demo": 3}[name]
    assert seen.found["width"] == width
    assert brightness(seen.found["paper"]) < 60 if is_dark else brightness(seen.found["paper"]) > 240
    assert abs(brightness(seen.found["ink"]) - brightness(seen.found["paper"])) > 150


def faults(seen: Seen) -> list[str]:
    found = [f"console: {message}" for message in seen.complaints]
    if seen.found["page_width"] > seen.found["width"]:
        found.append(f"the page is {seen.found['page_width']} wide on {seen.found['width']}")
    if seen.found["scrolled"]:
        found.append(f"{seen.found['scrolled']} tables are cut off")
    for chart in seen.found["charts"]:
        if not (chart["width"] > 100 and chart["height"] > 100 and chart["shapes"] > 10):
            found.append(f"{chart['title']} is not drawn: {chart}")
        if chart["empty"] or chart["cut_off"]:
            found.append(f"{chart['title']}: {chart['empty']} empty shapes, cut off: {chart['cut_off']}")
    return found


def brightness(colour: str) -> float:
    """0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_the_test_sees_a_broken_chart_a_wide_page_and_a_message(pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["young"].read_text(encoding="utf-8")
    for old, new, wanted in [
        (' d="M', ' d="Mnan ', "console"),
        ("</h1>", '</h1><div style="width:2000px">wide</div>', "wide on"),
        ("</h1>", "</h1><script>undefined_function()</script>", "console"),
        ("<td", '<td style="min-width:2000px"', "tables are cut off"),
        (
            "</text>",
            " with a label that is far too long for any chart of this page to show</text>",
            "cut off",
        ),
    ]:
        broken = tmp_path / "broken.html"
        broken.write_text(text.replace(old, new, 1), encoding="utf-8")
        assert any(wanted in fault for fault in faults(look(broken, tmp_path, DESKTOP))), wanted


def test_screenshots_can_be_taken_of_every_page(pages: dict[str, Path], tmp_path: Path) -> None:
    kept = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path / "kept"))
    kept.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        for kind, width, is_dark in [("phone", PHONE, False), ("desktop", DESKTOP, False), ("dark", DESKTOP, True)]:
            picture = tmp_path / f"{name}-{kind}.png"
            screenshot(page, picture, width, look(page, tmp_path, width).found["height"], is_dark)
            assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
            shutil.copy(picture, kept)
        printed = print_pages(page, tmp_path, f"{name}-paper")
        assert 1 <= len(printed) <= 9
        for picture in printed:
            shutil.copy(picture, kept)
