"""Intervals against worked-out answers, and against how often they hold the truth."""

import math

import numpy as np
import pytest

from moelpr.evaluate.bootstrap import NUM_DRAWS, Estimate, estimates, mean
from moelpr.evaluate.perplexity import LanguageScore


def score_of(bits, size=None, correct=None) -> LanguageScore:
    """A score whose documents are a byte and a token each, unless told otherwise."""
    ones = [1] * len(bits)
    return LanguageScore(list(bits), list(size or ones), ones, list(correct or ones), unknown_tokens=0, routing=None)


def test_the_value_is_a_ratio_of_sums_and_a_draw_is_too():
    estimate = estimates({"m": score_of([10, 1], size=[1, 9])}, 1, "en")["m"]["bits_per_byte"]
    assert estimate.value == pytest.approx(11 / 10)
    # Two documents: a draw holds the first twice, the second twice, or each once.
    assert {round(draw, 9) for draw in estimate.draws} == {10.0, round(1 / 9, 9), 1.1}
    assert np.mean(estimate.draws == estimate.draws.max()) == pytest.approx(1 / 4, abs=0.05)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        low, high = estimates({"m": score_of(rng.exponential(size=100))}, trial, "en")["m"]["bits_per_byte"].interval
        held += low < 1 < high
    assert 0.88 < held / 200 < 0.99


def test_a_paired_change_is_clear_where_the_numbers_alone_are_not():
    """Documents differ by far more than the models do, but every one of them got better."""
    hardness = np.random.default_rng(1).uniform(1, 9, 50)
    found = estimates({"base": score_of(hardness), "ours": score_of(0.98 * hardness)}, 1, "en")
    base, ours = found["base"]["bits_per_byte"], found["ours"]["bits_per_byte"]
    assert ours.interval[1] > base.interval[0]
    change = ours.relative_to(base)
    assert change.is_clear and change.interval == pytest.approx((-0.02, -0.02))
    noise = np.random.default_rng(2).permutation(hardness)
    unclear = estimates({"base": score_of(hardness), "ours": score_of(noise)}, 1, "en")
    assert not unclear["ours"]["bits_per_byte"].relative_to(unclear["base"]["bits_per_byte"]).is_clear


def test_draws_are_the_same_for_a_seed_and_others_for_another_seed_or_language():
    scores = {"m": score_of([1, 2, 3, 4, 5, 6], correct=[1, 0, 1, 1, 0, 1])}
    draws = [estimates(scores, *which)["m"]["accuracy"].draws for which in [(1, "en"), (1, "en"), (2, "en"), (1, "el")]]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any() and (draws[0] != draws[3]).any()


def test_a_mean_over_languages_is_surer_than_each():
    bits = np.random.default_rng(1).uniform(1, 2, 40)
    parts = [estimates({"m": score_of(bits)}, 1, language)["m"]["bits_per_byte"] for language in ("a", "b", "c", "d")]
    average = mean(parts)
    assert average.value == pytest.approx(parts[0].value)
    assert average.draws.std() == pytest.approx(parts[0].draws.std() / 2, rel=0.15)


def test_one_document_has_no_interval():
    estimate = estimates({"m": score_of([3])}, 1, "en")["m"]["perplexity"]
    assert estimate.value == 8 and all(math.isnan(bound) for bound in estimate.interval)
    assert estimate.to_json() == {"value": 8, "low": None, "high": None}
    assert not Estimate(1.0, np.full(NUM_DRAWS, np.nan)).is_clear
