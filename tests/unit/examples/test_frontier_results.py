"""The frontier's table and chart show the evaluation's numbers, per seed and over seeds."""

import json
import re
from pathlib import Path

import pytest

from examples.frontier_results import Frontier, frontier_chart, group_means, read_evaluation, results_tables
from examples.languages import LANGUAGES


@pytest.fixture
def results(tmp_path: Path) -> Frontier:
    """Two seeds of one setting: original languages 1% and 2% worse than a base of 2 bits, expanded ones 5% better."""
    bits = {"base": (2.0, 2.0), "a-1": (2.02, 1.9), "a-2": (2.04, 1.9)}
    originals = LANGUAGES[:3]
    text = {
        model: {"languages": {name: {"bits_per_byte": {"value": pair[name not in originals]}} for name in LANGUAGES}}
        for model, pair in bits.items()
    }
    layers = {name: {"all_original_share": [0.5, 0.7], "new_gate_weight": [0.1, 0.3]} for name in LANGUAGES}
    routing = {model: {"languages": layers} for model in bits if model != "base"}
    (tmp_path / "results.json").write_text(json.dumps({"models": text}))
    (tmp_path / "routing.json").write_text(json.dumps({"models": routing}))
    names_of = {"a": ("2 copies, γ 0.1", ["a-1", "a-2"]), "b": ("2 copies, after stage 1", ["a-1"])}
    return Frontier([1, 2], read_evaluation(tmp_path, names_of))


def test_changes_are_against_the_base_and_per_seed(results: Frontier) -> None:
    setting = results.settings["a"]
    assert setting.change["zh"] == pytest.approx([0.01, 0.02])
    assert setting.all_original_share["el"] == pytest.approx([0.6, 0.6])
    assert group_means(setting, ("en", "el")) == pytest.approx([-0.02, -0.015])


def test_the_tables_have_mean_and_range_over_seeds(results: Frontier) -> None:
    means, languages = (line for line in results_tables(results).splitlines() if "γ 0.1" in line)
    assert "+1.5% (+1.0% to +2.0%)" in means and "−5.0% (−5.0% to −5.0%)" in means
    assert [cell.strip() for cell in means.split("|")][-3:-1] == ["60 / 60%", "20 / 20%"]
    assert languages.count("+1.0% to +2.0%") == 3
    assert languages.count("−5.0% to −5.0%") == 3


def test_the_chart_has_a_line_per_number_of_copies_and_only_reviewed_models(results: Frontier) -> None:
    svg = frontier_chart(results)
    assert "2 copies, γ 0.1: −5.0% and +1.5%" in re.sub(r"\s+", " ", svg)
    assert "stage 1" not in svg


def test_the_results_in_the_documentation_are_read() -> None:
    assert Frontier.read(Path(__file__).parents[3] / "docs").seeds == [1, 2, 3]
