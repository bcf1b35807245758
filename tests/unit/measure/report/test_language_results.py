import json
import math
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.measure.report.evaluation_files import Continuation
from moelpr.measure.report.language_results import read_evaluations
from moelpr.measure.report.numbers import Interval


def test_evaluations_of_several_files_and_versions_are_joined(tmp_path: Path) -> None:
    first, second, old = (tmp_path / name for name in ("results.json", "routing.json", "old.json"))
    interval = {"value": 2.0, "low": 1.9, "high": 2.1}
    english = {"bits_per_byte": interval, "change": {"bits_per_byte": {"value": 0.1, "low": None, "high": None}}}
    models = {"ours": {"languages": {"en": english}, "means": {"mean original": {"bits_per_byte": interval}}}}
    sample = {"prompt": "Turn", "reference": "on", "by_model": {"ours": "off"}}
    first.write_text(json.dumps({"original_languages": ["en"], "models": models, "continuations": {"en": sample}}))
    routing = {"original_first_share": [0.5, None], "layers": [1, 3]}
    second.write_text(json.dumps({"original_languages": ["en"], "models": {"ours": {"languages": {"el": routing}}}}))
    old.write_text(json.dumps({"models": {"base": {"languages": {"el": {"bits_per_byte": {"value": 3.0}}}}}}))
    results = read_evaluations([first, second, old])
    assert results.groups == {"en": "original", "el": "expanded"}
    assert results.bits["ours"]["en"] == Interval(2.0, 1.9, 2.1) and results.bits["base"]["el"].value == 3.0
    assert results.change("ours", "en").value == 0.1 and not results.change("ours", "en").has_bounds
    assert results.layers["ours"] == [1, 3] and results.routing["original_first_share"]["ours"]["el"][0] == 0.5
    assert results.rows() == {"expanded": ["el"], "original": ["en", "mean original"]}
    assert results.continuations == {"en": Continuation(**sample)}


def test_changes_against_another_model_are_computed_again(tmp_path: Path) -> None:
    """The second file compares stage 2 with stage 1, the report with the first file's base."""
    bits = {"base": 2.0, "stage1": 1.5, "stage2": 1.4}
    paths = []
    for first, second in (("base", "stage1"), ("stage1", "stage2")):
        change = {"change": {"bits_per_byte": {"value": bits[second] / bits[first] - 1, "low": None, "high": None}}}
        models = {model: {"languages": {"el": {"bits_per_byte": {"value": bits[model]}}}} for model in (first, second)}
        models[second]["languages"]["el"] |= change
        paths.append(tmp_path / f"{second}.json")
        paths[-1].write_text(json.dumps({"models": models}))
    results = read_evaluations(paths)
    assert results.change("stage1", "el").value == pytest.approx(-0.25)
    assert results.change("stage2", "el").value == pytest.approx(-0.3)


def test_a_mean_is_over_the_languages_of_all_files(tmp_path: Path) -> None:
    """The mean in each file is over its own languages; in two files of the same ones, it keeps its interval."""
    paths = []
    for number, language in enumerate(("el", "hu")):
        bits = {"base": 2.0, "ours": 1.0 + number}
        interval = {model: {"bits_per_byte": {"value": bits[model], "low": 0.5, "high": 3.0}} for model in bits}
        change = {"bits_per_byte": {"value": bits["ours"] / 2 - 1, "low": -1.0, "high": 1.0}}
        interval["ours"] |= {"change": change}
        models = {
            name: {"languages": {language: actual}, "means": {"mean expanded": actual}}
            for name, actual in interval.items()
        }
        content = {"original_languages": ["en"], "models": models}
        paths.append(tmp_path / f"{language}.json")
        paths[-1].write_text(json.dumps(content))
    for both in (paths, paths[::-1]):
        results = read_evaluations(both)
        assert results.change("ours", "mean expanded").value == pytest.approx(1.5 / 2 - 1)
        assert not results.change("ours", "mean expanded").has_bounds
        assert results.value("ours", "mean expanded").value == pytest.approx(1.5)
    assert read_evaluations([paths[0], paths[0]]).change("ours", "mean expanded").has_bounds
    # A file without means says nothing about them, and in another round a language is no longer expanded.
    routing = {"models": {"ours": {"languages": {"el": {"original_first_share": [0.5]}}}}, "original_languages": ["en"]}
    paths[1].write_text(json.dumps(routing))
    assert read_evaluations(paths).change("ours", "mean expanded").has_bounds
    later = {"models": {"other": {"languages": {"el": {}}}}, "original_languages": ["en", "el"]}
    paths[1].write_text(json.dumps(later))
    assert math.isnan(read_evaluations(paths).value("ours", "mean expanded").value)


@pytest.mark.parametrize(
    "english",
    [{"bits_per_byte": "b"}, {"original_first_share": [0.5], "layers": [0, 1]}],
)
def test_a_file_of_something_else_is_rejected(tmp_path: Path, english: dict) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"models": {"a": {"languages": {"en": english}}}}))
    with pytest.raises(UserError, match=r"results\.json: .*--evaluation"):
        read_evaluations([path])


def test_the_layers_of_a_model_are_those_of_its_other_results(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.json" for number in (1, 2)]
    for number, path in enumerate(paths, start=1):
        languages = {"en": {"original_first_share": [0.5] * number}}
        path.write_text(json.dumps({"models": {"a": {"languages": languages}}}))
    with pytest.raises(UserError, match=r"2\.json: the layers of a on en"):
        read_evaluations(paths)
