import json
import math
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.measure.report.evaluation_files import Continuation
from moelpr.measure.report.language_results import read_evaluations
from moelpr.measure.report.numbers import Interval


def written(path: Path, models: dict, **content: object) -> Path:
    path.write_text(json.dumps({"models": models, **content}))
    return path


def test_evaluations_of_several_files_and_versions_are_joined(tmp_path: Path) -> None:
    interval = {"value": 2.0, "low": 1.9, "high": 2.1}
    english = {"bits_per_byte": interval, "change": {"bits_per_byte": {"value": 0.1, "low": None, "high": None}}}
    models = {"ours": {"languages": {"en": english}, "means": {"mean original": {"bits_per_byte": interval}}}}
    sample = {"prompt": "Turn", "reference": "on", "by_model": {"ours": "off"}}
    first = written(tmp_path / "1.json", models, original_languages=["en"], continuations={"en": sample})
    routing = {"original_first_share": [0.5, None], "layers": [1, 3]}
    second = written(tmp_path / "2.json", {"ours": {"languages": {"el": routing}}}, original_languages=["en"])
    old = written(tmp_path / "old.json", {"base": {"languages": {"el": {"bits_per_byte": {"value": 3.0}}}}})
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
        models = {model: {"languages": {"el": {"bits_per_byte": {"value": bits[model]}}}} for model in (first, second)}
        models[second]["languages"]["el"]["change"] = {"bits_per_byte": {"value": bits[second] / bits[first] - 1}}
        paths.append(written(tmp_path / f"{second}.json", models))
    results = read_evaluations(paths)
    assert results.change("stage1", "el").value == pytest.approx(-0.25)
    assert results.change("stage2", "el").value == pytest.approx(-0.3)


def test_a_mean_is_over_the_languages_of_all_files(tmp_path: Path) -> None:
    """The mean in each file is over its own languages; in two files of the same ones, it keeps its interval."""
    paths = []
    for number, language in enumerate(("el", "hu")):
        bits = {"base": 2.0, "ours": 1.0 + number}
        interval = {model: {"bits_per_byte": {"value": bits[model], "low": 0.5, "high": 3.0}} for model in bits}
        interval["ours"]["change"] = {"bits_per_byte": {"value": bits["ours"] / 2 - 1, "low": -1.0, "high": 1.0}}
        models = {name: {"languages": {language: x}, "means": {"mean expanded": x}} for name, x in interval.items()}
        paths.append(written(tmp_path / f"{language}.json", models, original_languages=["en"]))
    for both in (paths, paths[::-1]):
        results = read_evaluations(both)
        assert results.change("ours", "mean expanded").value == pytest.approx(1.5 / 2 - 1)
        assert not results.change("ours", "mean expanded").has_bounds
        assert results.value("ours", "mean expanded").value == pytest.approx(1.5)
    assert read_evaluations([paths[0], paths[0]]).change("ours", "mean expanded").has_bounds
    # A file without means says nothing about them, and in another round a language is no longer expanded.
    routing = {"ours": {"languages": {"el": {"original_first_share": [0.5]}}}}
    written(paths[1], routing, original_languages=["en"])
    assert read_evaluations(paths).change("ours", "mean expanded").has_bounds
    written(paths[1], {"other": {"languages": {"el": {}}}}, original_languages=["en", "el"])
    assert math.isnan(read_evaluations(paths).value("ours", "mean expanded").value)


@pytest.mark.parametrize("english", [{"bits_per_byte": "b"}, {"original_first_share": [0.5], "layers": [0, 1]}])
def test_a_file_of_something_else_is_rejected(tmp_path: Path, english: dict) -> None:
    path = written(tmp_path / "results.json", {"a": {"languages": {"en": english}}})
    with pytest.raises(UserError, match=r"results\.json: .*--evaluation"):
        read_evaluations([path])


def test_the_layers_of_a_model_are_those_of_its_other_results(tmp_path: Path) -> None:
    shares = {number: {"en": {"original_first_share": [0.5] * number}} for number in (1, 2)}
    paths = [written(tmp_path / f"{n}.json", {"a": {"languages": languages}}) for n, languages in shares.items()]
    with pytest.raises(UserError, match=r"2\.json: the layers of a on en"):
        read_evaluations(paths)
