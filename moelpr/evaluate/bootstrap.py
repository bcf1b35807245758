"""How sure a number is: percentile bootstrap over documents (Efron and Tibshirani, 1993, chapter 13).

A language's documents are drawn again with replacement, as many as there are, and the number is computed anew; the
middle 95 % of such numbers are its interval. All models see the same draws, so that a change between two models is
computed draw by draw: what makes a document hard for both cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moelpr.evaluate.perplexity import LanguageScore

NUM_DRAWS = 1000
CONFIDENCE = 0.95
METRICS = ("bits_per_byte", "perplexity", "accuracy")


@dataclass(frozen=True)
class Estimate:
    """A number, and what it was in each draw of the documents [NUM_DRAWS]."""

    value: float
    draws: NDArray[np.float64]

    @property
    def interval(self) -> tuple[float, float]:
        """What the middle 95 % of the draws lie between; NaN where a language has a single document."""
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(self.draws, [tail, 100 - tail])
        return float(low), float(high)

    @property
    def is_clear(self) -> bool:
        """For a change: 0 lies outside its interval."""
        low, high = self.interval
        return low > 0 or high < 0

    def relative_to(self, reference: "Estimate") -> "Estimate":
        """Relative change: 0.1 is 10 % more than `reference`."""
        return Estimate(self.value / reference.value - 1, self.draws / reference.draws - 1)

    def minus(self, reference: "Estimate") -> "Estimate":
        return Estimate(self.value - reference.value, self.draws - reference.draws)

    def to_json(self) -> dict[str, Any]:
        low, high = (None if np.isnan(bound) else bound for bound in self.interval)
        return {"value": self.value, "low": low, "high": high}


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean, over languages; their draws are independent of each other."""
    return Estimate(
        sum(estimate.value for estimate in estimates) / len(estimates),
        np.mean([estimate.draws for estimate in estimates], axis=0),
    )


def estimates(scores: Mapping[str, LanguageScore], seed: int, language: str) -> dict[str, dict[str, Estimate]]:
    """One language's METRICS of each model (model -> metric -> estimate), from the same draws for all of them."""
    columns = np.array(
        [
            column
            for score in scores.values()
            for column in (score.document_bits, score.document_bytes, score.document_tokens, score.document_correct)
        ],
        dtype=np.float64,
    ).T
    # Seeded by the language too, or the draws of two languages would not be independent, and a mean's interval wrong.
    sums = _resampled_sums(columns, np.random.default_rng([seed, *language.encode()]))
    result = {}
    for index, (model, score) in enumerate(scores.items()):
        bits, size, tokens, correct = sums[:, 4 * index : 4 * index + 4].T
        draws = {"bits_per_byte": bits / size, "perplexity": 2 ** (bits / tokens), "accuracy": correct / tokens}
        result[model] = {metric: Estimate(getattr(score, metric), draws[metric]) for metric in METRICS}
    return result


def _resampled_sums(columns: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Sums over drawn documents [NUM_DRAWS, columns] of `columns` [documents, columns]."""
    num_documents = len(columns)
    if num_documents == 1:
        return np.full((NUM_DRAWS, columns.shape[1]), np.nan)
    sums = np.empty((NUM_DRAWS, columns.shape[1]))
    for draw in range(NUM_DRAWS):
        times = np.bincount(rng.integers(num_documents, size=num_documents), minlength=num_documents)
        sums[draw] = times @ columns
    return sums
