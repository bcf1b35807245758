"""Bootstrap intervals against worked-out answers, and against how often they contain the truth."""

import math
from pathlib import Path

import numpy as np
import pytest

from moelpr.evaluate.compare import Comparison
from moelpr.evaluate.results import NUM_SAMPLES, Estimate, TextResults, estimates, mean
from moelpr.evaluate.scoring import LanguageScore, Settings


def score_of(bits, size=None, correct=None) -> LanguageScore:
    """A score whose documents are a byte and a token each, by default."""
    ones = [1] * len(bits)
    return LanguageScore(list(bits), list(size or ones), ones, list(correct or ones), unknown_tokens=0, routing=None)


def test_a_value_is_a_ratio_of_sums_and_so_is_each_sample():
    estimate = estimates({"m": score_of([10, 1], size=[1, 9])}, 1, "en")["m"]["bits_per_byte"]
    assert estimate.value == pytest.approx(11 / 10)
    # Two documents: a sample contains the first twice, the second twice, or each once.
    assert {round(sample, 9) for sample in estimate.samples} == {10.0, round(1 / 9, 9), 1.1}
    assert np.mean(estimate.samples == estimate.samples.max()) == pytest.approx(1 / 4, abs=0.05)


def test_a_95_percent_interval_contains_the_truth_about_as_often():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        estimate = estimates({"m": score_of(rng.exponential(size=100))}, trial, "en")["m"]["bits_per_byte"]
        hits += estimate.interval.low < 1 < estimate.interval.high
    assert 0.88 < hits / 200 < 0.99


def test_a_paired_change_is_clear_when_the_intervals_overlap():
    """Documents differ by far more than the models do, but each of them improved."""
    hardness = np.random.default_rng(1).uniform(1, 9, 50)
    found = estimates({"base": score_of(hardness), "ours": score_of(0.98 * hardness)}, 1, "en")
    base, ours = found["base"]["bits_per_byte"], found["ours"]["bits_per_byte"]
    assert ours.interval.high > base.interval.low
    change = ours.relative_to(base)
    assert change.is_clear and change.interval == pytest.approx((-0.02, -0.02, -0.02))
    noise = np.random.default_rng(2).permutation(hardness)
    unclear = estimates({"base": score_of(hardness), "ours": score_of(noise)}, 1, "en")
    assert not unclear["ours"]["bits_per_byte"].relative_to(unclear["base"]["bits_per_byte"]).is_clear


def test_samples_depend_only_on_seed_and_language():
    scores = {"m": score_of([1, 2, 3, 4, 5, 6], correct=[1, 0, 1, 1, 0, 1])}
    keys = [(1, "en"), (1, "en"), (2, "en"), (1, "el")]
    first, again, seed, language = (estimates(scores, *key)["m"]["accuracy"].samples for key in keys)
    assert (first == again).all()
    assert (first != seed).any() and (first != language).any()


def test_a_mean_over_languages_has_a_narrower_interval_than_each():
    bits = np.random.default_rng(1).uniform(1, 2, 40)
    parts = [estimates({"m": score_of(bits)}, 1, language)["m"]["bits_per_byte"] for language in ("a", "b", "c", "d")]
    average = mean(parts)
    assert average.value == pytest.approx(parts[0].value)
    assert average.samples.std() == pytest.approx(parts[0].samples.std() / 2, rel=0.15)


def test_one_document_has_no_interval():
    estimate = estimates({"m": score_of([3])}, 1, "en")["m"]["perplexity"]
    assert estimate.value == 8 and all(math.isnan(bound) for bound in estimate.interval[1:])
    assert estimate.to_json() == {"value": 8, "low": None, "high": None}
    assert not Estimate(1.0, np.full(NUM_SAMPLES, np.nan)).is_clear


def text_results(scores: dict[str, LanguageScore]) -> TextResults:
    """Of models on English as an original language."""
    models = {model: Path(model) for model in scores}
    by_model = {model: {"en": score} for model, score in scores.items()}
    return TextResults(Comparison(models, Settings(64, 16), by_model, 0, {}), {"en": Path("en.jsonl")}, ["en"], seed=1)


def test_models_with_different_tokens_are_compared_in_bits_per_byte_only():
    base = score_of([1, 2, 3])
    other = LanguageScore([1, 2, 4], [1, 1, 1], [2, 2, 2], [1, 1, 1], unknown_tokens=0, routing=None)
    changes = text_results({"base": base, "same": base, "other": other}).to_json()["models"]
    assert changes["same"]["languages"]["en"]["change"].keys() == {"bits_per_byte", "perplexity", "accuracy"}
    assert changes["other"]["languages"]["en"]["change"].keys() == {"bits_per_byte"}
    assert changes["other"]["languages"]["en"]["change"]["bits_per_byte"]["value"] == pytest.approx(1 / 6)


def test_findings_name_the_better_model_and_text_that_a_tokenizer_cannot_encode():
    base = score_of([2.0, 4.0, 6.0])
    better = LanguageScore([1.0, 2.0, 3.0], [1] * 3, [1] * 3, [1] * 3, unknown_tokens=1, routing=None)
    findings = text_results({"base": base, "better": better}).findings()
    assert any("English: better is better than base (\u221250.0%" in finding for finding in findings)
    assert any("better" in finding and "33.3%" in finding for finding in findings)
