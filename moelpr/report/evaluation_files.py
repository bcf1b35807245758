"""The files of `python -m moelpr.evaluate`, as far as reports read them: results.json and routing.json."""

import math
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Self

from pydantic.dataclasses import dataclass

from moelpr.process.errors import UserError
from moelpr.report.numbers import Interval
from moelpr.store import records
from moelpr.store.records import FOREIGN

Shares = list[float | None]


@dataclass(frozen=True, config=FOREIGN)
class MeasuredInterval:
    """A number with its 95% confidence interval.

    Attributes:
        value: The number; null if it is infinite or NaN.
        low: The lower bound; null without an interval.
        high: The upper bound.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> Interval:
        return Interval(*floats((self.value, self.low, self.high)))


@dataclass(frozen=True, config=FOREIGN)
class ExpertShare:
    """The fraction of first choices that are an original expert, in results.json.

    Attributes:
        per_layer: The fraction per MoE layer.
        layers: The numbers of the MoE layers.
    """

    per_layer: Shares
    layers: list[int] | None = None


@dataclass(frozen=True, config=FOREIGN)
class LanguageResult:
    """What was measured of a model in a language, or the mean over languages.

    Attributes:
        bits_per_byte: Bits per byte.
        change: Metric -> its change against the first model.
        original_expert_share: The fraction of first choices that are an original expert, in results.json.
        original_first_share: The same per MoE layer, in routing.json.
        layers: The numbers of the MoE layers, in routing.json.
        all_original_share: The fraction of tokens whose choices are all original experts, per MoE layer.
    """

    bits_per_byte: MeasuredInterval | None = None
    change: dict[str, MeasuredInterval] = field(default_factory=dict)
    original_expert_share: ExpertShare | None = None
    original_first_share: Shares | None = None
    layers: list[int] | None = None
    all_original_share: Shares | None = None

    def __post_init__(self) -> None:
        lists = [self.moe_layers, *self.shares.values()]
        if len({len(values) for values in lists if values is not None}) > 1:
            raise UserError("its lists per layer have different lengths")

    @property
    def shares(self) -> dict[str, list[float]]:
        """Name in `ROUTING_SHARES` -> fraction per MoE layer, of those that were measured."""
        share = self.original_expert_share
        first = self.original_first_share or (share.per_layer if share else None)
        found = {"original_first_share": first, "all_original_share": self.all_original_share}
        return {name: floats(values) for name, values in found.items() if values}

    @property
    def moe_layers(self) -> list[int] | None:
        """The numbers of the MoE layers; None if unknown."""
        return self.layers or (self.original_expert_share.layers if self.original_expert_share else None)


@dataclass(frozen=True, config=FOREIGN)
class ModelResult:
    """A model's results.

    Attributes:
        languages: Language -> result.
        means: "mean original" and "mean expanded" -> result.
    """

    languages: dict[str, LanguageResult]
    means: dict[str, LanguageResult] = field(default_factory=dict)


@dataclass(frozen=True, config=FOREIGN)
class Continuation:
    """What models write after the first words of a held-out document.

    Attributes:
        prompt: The first words.
        reference: How the document continues.
        by_model: Model -> its continuation.
    """

    prompt: str
    reference: str
    by_model: dict[str, str]


@dataclass(frozen=True, config=FOREIGN)
class EvaluationFile:
    """results.json or routing.json.

    Attributes:
        models: Model -> results; changes are relative to the first one.
        original_languages: The languages that the base supports; empty if unknown.
        continuations: Language -> continuation.
    """

    models: dict[str, ModelResult]
    original_languages: list[str] = field(default_factory=list)
    continuations: dict[str, Continuation] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of --evaluation.

        Raises:
            UserError: The file is missing, damaged, or another program's.
        """
        return records.read(cls, path, "pass files that `python -m moelpr.evaluate` wrote as --evaluation")


def floats(values: Sequence[float | None]) -> list[float]:
    """The numbers, with NaN for null."""
    return [math.nan if value is None else value for value in values]
