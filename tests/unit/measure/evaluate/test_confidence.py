import numpy as np
import pytest

from moelpr.measure.evaluate.confidence import estimates, interval_of, mean
from tests.unit.measure.evaluate.conftest import score_of


def test_a_value_is_a_ratio_of_sums_and_so_is_each_sample():
    estimate = estimates({"m": score_of([10, 1], size=[1, 9])}, 1)["m"]["bits_per_byte"]
    assert estimate[0] == pytest.approx(11 / 10)
    # Two documents: a sample contains the first twice, the second twice, or each once.
    assert {round(sample, 9) for sample in estimate[1:]} == {10.0, round(1 / 9, 9), 1.1}
    assert np.mean(estimate[1:] == estimate[1:].max()) == pytest.approx(1 / 4, abs=0.05)


def test_a_95_percent_interval_contains_the_truth_about_as_often():
    rng = np.random.default_rng(5)
    scores = [{"m": score_of(rng.exponential(size=100))} for _ in range(200)]
    intervals = [interval_of(estimates(one, trial)["m"]["bits_per_byte"]) for trial, one in enumerate(scores)]
    assert 0.88 < np.mean([interval.low < 1 < interval.high for interval in intervals]) < 0.99


def test_samples_depend_on_the_seed_alone():
    scores = {"m": score_of([1, 2, 3, 4, 5, 6], correct=[1, 0, 1, 1, 0, 1])}
    first, again, other = (estimates(scores, seed)["m"]["accuracy"][1:] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def spread(bits) -> float:
    """The standard error of the mean over texts, given as the bits of their documents."""
    parts = [estimates({"m": score_of(its)}, 1)["m"]["bits_per_byte"] for its in bits]
    assert mean(parts)[0] == pytest.approx(np.mean([np.mean(its) for its in bits]))
    return mean(parts)[1:].std()


def test_a_mean_over_unrelated_texts_is_more_certain_and_one_over_parallel_texts_is_not():
    bits = np.random.default_rng(1).uniform(1, 2, (4, 200))
    alone = spread(bits[:1])
    assert spread(bits) == pytest.approx(alone / 2, rel=0.15)
    assert spread([bits[0]] * 4) == pytest.approx(alone, rel=0.01)
