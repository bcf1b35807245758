"""Each claim of the demo is judged by its own number."""

from pathlib import Path
from typing import Any

import pytest

from examples.demo_claims import CHECKS, judge, read_checks


@pytest.fixture
def report() -> dict[str, Any]:
    """Hand-picked changes that show every claim."""
    changes = {
        "full_finetune": {"en": 0.5, "zh": 0.4, "el": -0.2},
        "stage1": {"en": 0.2, "zh": 0.2, "el": -0.1},
        "stage2": {"en": 0.005, "zh": -0.01, "el": -0.09},
    }
    return {
        "languages": {"en": "original", "zh": "original", "el": "expanded"},
        "change": {model: {name: {"value": v} for name, v in values.items()} for model, values in changes.items()},
    }


def missed(report: dict[str, Any], checked: tuple[str, ...] = tuple(CHECKS)) -> set[tuple[str, str]]:
    judgments = [*judge(report, {name: {"equal": True, "max_abs_diff": 0.0} for name in checked})]
    assert len(judgments) == 2 * 1 + 3 * 2 + 3
    return {(judgment.name, judgment.language) for judgment in judgments if not judgment.ok}


@pytest.mark.parametrize(
    ("model", "language", "change", "within", "broken"),
    [
        ("stage1", "el", -0.0499, -0.0501, "learned"),
        ("stage2", "el", -0.0449, -0.0451, "kept_by_review"),
        ("stage2", "zh", 0.0101, 0.0099, "preserved"),  # yet 90% of stage 1's +20% are undone
        ("stage1", "en", 0.0499, 0.0501, "repaired"),  # stage 2's +0.5% is a tenth of it
        ("stage1", "en", -0.01, 0.2, "repaired"),  # nothing was lost, so nothing could be undone
        ("full_finetune", "en", 0.1049, 0.1051, "better_than_full_finetune"),
    ],
)
def test_each_claim_fails_alone_if_its_number_misses(report, model, language, change, within, broken) -> None:
    for value, expected in ((change, {(broken, language)}), (within, set())):
        report["change"][model][language]["value"] = value
        assert missed(report) == expected


def test_what_was_not_measured_is_not_shown(report: dict[str, Any]) -> None:
    report["change"]["stage2"]["en"]["value"] = None
    del report["change"]["stage2"]["el"]
    names = {("preserved", "en"), ("repaired", "en"), ("better_than_full_finetune", "en"), ("kept_by_review", "el")}
    assert missed(report, ("check-upcycled", "check-frozen")) == names | {("check-export", "")}


def test_a_check_is_the_last_json_line_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = '{"equal": false}\na warning\n{"equal": true, "max_abs_diff": null}\n'
    for name, content in {"check-export": log, "check-frozen": "Traceback"}.items():
        (tmp_path / "logs" / f"{name}.log").write_text(content)
    assert read_checks(tmp_path) == {"check-export": {"equal": True, "max_abs_diff": None}}
