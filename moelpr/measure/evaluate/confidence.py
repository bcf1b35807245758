"""Confidence intervals of numbers and of their changes between models.

Intervals are percentile bootstrap intervals over documents (Efron and Tibshirani, 1993, chapter 13). A language's
documents are sampled with replacement, as many as there are, and the number is computed from the sample; the middle 95%
of 1,000 such numbers are its interval. All models get the same samples, and a change between two models is computed
sample by sample: what makes a document hard for both cancels out. Languages with equally many documents get the same
samples too: in parallel text, documents with the same number are translations of each other, alike in difficulty, and
independent samples would make the interval of a mean over languages too narrow.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moelpr.measure.report.numbers import Interval

if TYPE_CHECKING:
    from moelpr.measure.evaluate.scoring import LanguageScore

NUM_SAMPLES = 1000
# [1 + NUM_SAMPLES]: a number, then what it is in each bootstrap sample of the documents.
Estimate = NDArray[np.float64]


def estimates(scores: Mapping[str, "LanguageScore"], seed: int) -> dict[str, dict[str, Estimate]]:
    """The metrics of one text from the same samples for all models: model -> metric -> estimate."""
    from moelpr.measure.evaluate.scoring import metrics  # only now, as it imports torch

    columns = np.array([column for score in scores.values() for column in score.columns], dtype=np.float64).T
    size = len(columns)
    rng = np.random.default_rng([seed, size])
    sums = np.full((NUM_SAMPLES, columns.shape[1]), np.nan)
    for number in range(NUM_SAMPLES if size > 1 else 0):
        sums[number] = np.bincount(rng.integers(size, size=size), minlength=size) @ columns
    result, first = {}, 0
    for model, score in scores.items():
        samples = metrics(*sums[:, first : (first := first + len(score.columns))].T)
        result[model] = {metric: np.append(value, samples[metric]) for metric, value in score.metrics.items()}
    return result


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over languages, sample by sample."""
    numbers = np.mean(estimates, axis=0)
    numbers[0] = sum(float(estimate[0]) for estimate in estimates) / len(estimates)  # more exact
    return numbers


def interval_of(estimate: Estimate) -> Interval:
    """The number and its 95% confidence interval, whose bounds are NaN for a language with a single document."""
    with np.errstate(invalid="ignore"):  # between infinite numbers, it is NaN
        bounds = np.percentile(estimate[1:], [2.5, 97.5])
    return Interval(float(estimate[0]), *map(float, bounds))
