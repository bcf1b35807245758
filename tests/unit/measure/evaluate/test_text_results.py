import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moelpr.measure.evaluate.compare import Comparison
from moelpr.measure.evaluate.scoring import LanguageScore, Settings
from moelpr.measure.evaluate.text_results import TextResults
from moelpr.measure.report.numbers import Interval
from tests.unit.measure.evaluate.conftest import score_of


def text_results(scores: dict[str, LanguageScore], window: int = 64) -> TextResults:
    """The results of models on English as an original language."""
    models = {model: Path(model) for model in scores}
    by_model = {model: {"en": score} for model, score in scores.items()}
    return TextResults(
        Comparison(models, Settings(window, window // 4), by_model, 0, {}), {"en": Path("en.jsonl")}, ["en"], seed=1
    )


def test_a_paired_change_is_clear_when_the_intervals_overlap():
    """Documents differ by far more than the models do, but each of them improved."""
    hardness = np.random.default_rng(1).uniform(1, 9, 50)
    noise = np.random.default_rng(2).permutation(hardness)
    scores = {"base": score_of(hardness), "ours": score_of(0.98 * hardness), "noise": score_of(noise)}
    results = json.loads(text_results(scores).json_text())["models"]
    base, ours, unclear = (results[model]["languages"]["en"] for model in scores)
    assert ours["bits_per_byte"]["high"] > base["bits_per_byte"]["low"]
    change = ours["change"]["bits_per_byte"]
    assert list(change.values()) == pytest.approx([-0.02, -0.02, -0.02])
    assert not Interval(**unclear["change"]["bits_per_byte"]).is_clear


def test_one_document_has_no_interval():
    results = text_results({"base": score_of([3]), "ours": score_of([2])})
    base, ours = json.loads(results.json_text())["models"].values()
    assert base["languages"]["en"]["perplexity"] == {"value": 8, "low": None, "high": None}
    change = ours["languages"]["en"]["change"]["bits_per_byte"]
    assert change == {"value": pytest.approx(-1 / 3), "low": None, "high": None}


def test_models_with_different_tokenizers_are_compared_in_what_does_not_depend_on_tokens():
    base = LanguageScore([1, 2, 3], [2, 2, 4], [2, 2, 4], [1, 1, 1], unknown_tokens=0, routing=None)
    scores = {"base": base, "same": base, "fewer": replace(base, document_bits=[1, 2, 4], document_tokens=[1, 1, 2])}
    actual = text_results(scores)
    models = {name: model["languages"]["en"] for name, model in json.loads(actual.json_text())["models"].items()}
    everything = {"bits_per_byte", "perplexity", "accuracy", "bytes_per_token"}
    assert models["same"]["change"].keys() == everything
    assert models["fewer"]["change"].keys() == {"bits_per_byte", "bytes_per_token"}
    assert models["fewer"]["change"]["bits_per_byte"]["value"] == pytest.approx(1 / 6)
    assert [model["bytes_per_token"]["value"] for model in models.values()] == [1, 1, 2]
    assert models["fewer"]["change"]["bytes_per_token"] == {"value": 1, "low": 1, "high": 1}
    table = actual.tables()["Bytes per token (higher is better)"]
    assert [row.cells[0] for row in table.rows] == ["en", "mean original"]
    assert [cell.split()[0] for cell in table.rows[0].cells[1:]] == ["1.00", "1.00", "2.00"]
    # Each document fits the window of 64 tokens; of 3, one does not.
    assert not any("window" in finding for finding in actual.findings())
    (finding,) = [text for text in text_results(scores, window=3).findings() if "window" in text]
    assert "1 of 3 documents" in finding and "window of 3 tokens" in finding and "has 4 tokens" in finding
    assert not any("window" in text for text in text_results({"base": base, "same": base}, window=3).findings())


def test_findings_name_the_better_model_and_text_that_a_tokenizer_cannot_encode():
    base, better = score_of([2.0, 4.0, 6.0]), replace(score_of([1.0, 2.0, 3.0]), unknown_tokens=1)
    findings = text_results({"base": base, "better": better}).findings()
    assert any("English: better is better than base (\u221250.0%" in finding for finding in findings)
    assert any("better" in finding and "33.3%" in finding for finding in findings)
