"""The files of `moelpr evaluate`, which reports and cards read: results.json, routing.json and harness.json."""

import math
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Self

from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.languages import language_name
from moelpr.base.records import FOREIGN
from moelpr.measure.report import page
from moelpr.measure.report.numbers import Interval, Measured
from moelpr.model.metrics.schema import ROUTING_SHARES

TEXT_ITSELF = "the text itself"  # the writer of a document's own continuation


@dataclass(frozen=True, config=FOREIGN)
class LanguageResult:
    """The measurements of a model in a language, or their means over languages.

    Attributes:
        bits_per_byte: Bits per byte, in results.json, as all until `change`.
        perplexity: Perplexity per token.
        accuracy: The fraction of tokens that were the most likely next token.
        bytes_per_token: Bytes per token of the model's tokenizer.
        distance: KL(base‖model) in nats per token, if a base was given.
        documents: The number of documents.
        bytes: The bytes of the text.
        unknown_tokens: The number of tokens that stand for text which the tokenizer does not know.
        change: Metric -> its change against the first model.
        tokens: The number of tokens, in both files, as all until `layers`.
        original_first_share: The fraction of first choices that are an original expert, per MoE layer.
        all_original_share: The fraction of tokens whose choices are all original experts.
        new_gate_weight: The mean gate weight of new experts, from 0 to 1.
        layers: The numbers of the MoE layers, from 0.
        first_choice_share: The fraction of tokens whose first choice is an expert, in routing.json, as all below.
        chosen_share: The fraction of tokens that choose an expert; the sum is K per layer.
        mean_score: The mean router score of an expert.
        entropy: The mean entropy of a token's router scores, in nats.
        original_chosen_share: The fraction of tokens with an original expert among their choices.
        load_imbalance: The tokens of the busiest expert divided by the mean over experts.
        num_original_places: The number of places of original experts.
    """

    bits_per_byte: Interval | None = None
    perplexity: Interval | None = None
    accuracy: Interval | None = None
    bytes_per_token: Interval | None = None
    distance: Interval | None = None
    documents: int | None = None
    bytes: int | None = None
    unknown_tokens: int | None = None
    change: dict[str, Interval] = field(default_factory=dict)
    tokens: int | None = None
    original_first_share: list[Measured] | None = None
    all_original_share: list[Measured] | None = None
    new_gate_weight: list[Measured] | None = None
    layers: list[int] | None = None
    first_choice_share: list[list[Measured]] | None = None
    chosen_share: list[list[Measured]] | None = None
    mean_score: list[list[Measured]] | None = None
    entropy: list[Measured] | None = None
    original_chosen_share: list[Measured] | None = None
    load_imbalance: list[Measured] | None = None
    num_original_places: int | None = None

    def __post_init__(self) -> None:
        lists = [self.layers, self.new_gate_weight, *self.shares.values()]
        if len({len(values) for values in lists if values is not None}) > 1:
            raise UserError("its lists per layer have different lengths")

    @property
    def shares(self) -> dict[str, list[float]]:
        """Name in `ROUTING_SHARES` -> fraction per MoE layer, of those that were measured."""
        return {name: values for name in ROUTING_SHARES if (values := getattr(self, name))}


@dataclass(frozen=True, config=FOREIGN)
class BenchmarkScore(Interval):
    """A score on a benchmark in a language, from 0 to 100, with its 95% interval.

    Attributes:
        stderr: The standard error.
        change: The change against the first model, paired by question.
    """

    stderr: Measured = math.nan
    change: Interval | None = None


@dataclass(frozen=True, config=FOREIGN)
class BrokenPrior:
    """A layer that sends more than the allowed fraction of a language's tokens to the wrong kind of expert.

    Attributes:
        language: The language.
        is_original: Whether it is an original language, whose tokens choose a new expert first; else the other way.
        layer: The number of the decoder layer, from 0.
        share: The fraction of the language's tokens that make the wrong first choice.
    """

    language: str
    is_original: bool
    layer: int
    share: float


@dataclass(frozen=True, config=FOREIGN)
class ModelResult:
    """A model's results.

    Attributes:
        directory: The model.
        languages: Language -> result.
        means: "mean original" and "mean expanded" -> result.
        scores: Benchmark -> language -> score, in harness.json.
        averages: "expanded" and "original" -> mean score, in harness.json; null without any.
        average_changes: The changes of these means against the first model.
        broken_priors: The layers that break the language prior, in routing.json.
    """

    directory: str = ""
    languages: dict[str, LanguageResult] = field(default_factory=dict)
    means: dict[str, LanguageResult] = field(default_factory=dict)
    scores: dict[str, dict[str, BenchmarkScore]] = field(default_factory=dict)
    averages: dict[str, Measured | None] = field(default_factory=dict)
    average_changes: dict[str, Interval] = field(default_factory=dict)
    broken_priors: list[BrokenPrior] = field(default_factory=list)


@dataclass(frozen=True, config=FOREIGN)
class Continuation:
    """Continuations of the first words of a held-out document.

    Attributes:
        prompt: The first words.
        reference: How the document continues.
        by_model: Model -> its continuation.
    """

    prompt: str
    reference: str
    by_model: dict[str, str]


@dataclass(frozen=True, config=FOREIGN)
class WrongLanguage:
    """How often continuations are in another language than the text.

    Attributes:
        rate: The fraction of those whose language was identified.
        decided: Their number.
        undecided: The number of others: too short, mostly code or numbers, or uncertain.
    """

    rate: Interval
    decided: int
    undecided: int


@dataclass(frozen=True, config=FOREIGN)
class BenchmarkRun:
    """How a benchmark was run.

    Attributes:
        metric: The harness's metric.
        num_fewshot: The number of examples before each question.
        tasks: Language -> the harness's tasks.
    """

    metric: str
    num_fewshot: int
    tasks: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, config=FOREIGN)
class EvaluationFile:
    """results.json, routing.json or harness.json; what a file does not have is left out or empty.

    Attributes:
        models: Model -> results; changes are relative to the first one.
        settings: The settings of the command.
        data: Language -> its text, in results.json and routing.json.
        benchmarks: Benchmark -> how it was run, in harness.json.
        groups: "expanded" and "original" -> languages, in harness.json.
        original_languages: The languages that the base supports; empty if unknown.
        continuations: Language -> continuation.
        wrong_language: Language -> model, or "the text itself" -> how often its continuations are in another language.
    """

    models: dict[str, ModelResult]
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    benchmarks: dict[str, BenchmarkRun] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    original_languages: list[str] = field(default_factory=list)
    continuations: dict[str, Continuation] = field(default_factory=dict)
    wrong_language: dict[str, dict[str, WrongLanguage]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of --evaluation."""
        return records.read(cls, path, "pass files that `moelpr evaluate` wrote as --evaluation")


def continuation_samples(
    continuations: Mapping[str, Continuation], wrong_language: Mapping[str, Mapping[str, WrongLanguage]], note: str
) -> list[page.Block]:
    """Show the continuations of each language, and how often they are in another; `note` says what one is worth."""
    samples = [
        page.Sample(
            code, language_name(code), continued.prompt, continued.by_model | {TEXT_ITSELF: continued.reference}
        )
        for code, continued in continuations.items()
    ]
    what = f"The first words of a held-out document, continued by each model. {note}"
    tables = [wrong_language_table(wrong_language)] if wrong_language else []
    return [*tables, page.Text(what, "note"), *samples] if samples else []


def wrong_language_table(rates: Mapping[str, Mapping[str, WrongLanguage]]) -> page.Table:
    """The rates per language and writer."""
    writers = list(dict.fromkeys(writer for by_writer in rates.values() for writer in by_writer))
    rows = [
        [code, *(_rate_text(by_writer[writer]) if writer in by_writer else "–" for writer in writers)]
        for code, by_writer in rates.items()
    ]
    note = (
        "Continuations that are in another language than their prompt, by language identification, of those whose "
        "language shows; in brackets: 95% confidence intervals (Wilson). Short ones, code and uncertain ones are left "
        f"out. What is found in {TEXT_ITSELF} are errors of the identification."
    )
    return page.Table(["continued in another language", *writers], rows, note)


def _rate_text(rate: WrongLanguage) -> str:
    if not rate.decided:
        return f"– (none of {rate.undecided} identified)"
    return f"{rate.rate.text('{:.0%}'.format)} of {rate.decided}"
