"""Results of `examples.frontier`: changes of bits per byte per setting, language and seed, as a table and a chart."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from pydantic.dataclasses import dataclass

from examples.languages import EXPANDED, LANGUAGES, ORIGINAL
from moelpr.base import records
from moelpr.base.languages import language_name
from moelpr.base.records import STRICT, Record
from moelpr.measure.report.evaluation_files import EvaluationFile
from moelpr.measure.report.numbers import percent
from moelpr.measure.report.page import Table, markdown_table
from moelpr.measure.report.plots import Series, trade_off_chart


@dataclass(frozen=True, config=STRICT)
class Results:
    """What one setting of the frontier has reached.

    Attributes:
        label: Setting in words.
        change: Language -> per seed, the relative change of bits per byte against the base.
        all_original_share: Language -> per seed, the fraction of tokens with original experts only, over MoE layers.
        new_gate_weight: Language -> per seed, the mean gate weight of new experts over MoE layers, if it was measured.
    """

    label: str
    change: dict[str, list[float]]
    all_original_share: dict[str, list[float]]
    new_gate_weight: dict[str, list[float]] | None = None


@dataclass(frozen=True, config=STRICT)
class Frontier(Record):
    """Learning against forgetting over settings and seeds, `frontier.json`.

    Attributes:
        seeds: Seeds of each setting.
        settings: Setting -> its results.
    """

    FILE_NAME: ClassVar[str] = "frontier.json"
    REMEDY: ClassVar[str] = "run python -m examples.frontier again"
    INDENT: ClassVar[int | None] = 1

    seeds: list[int]
    settings: dict[str, Results]


def read_evaluation(folder: Path, names_of: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, Results]:
    """Read the results of each setting from results.json and routing.json of an evaluation.

    Args:
        names_of: Setting -> its label, and the names of its models, one per seed.
    """
    text, routing = (
        records.read(EvaluationFile, folder / name, Frontier.REMEDY).models for name in ("results.json", "routing.json")
    )

    def change(model: str, language: str) -> float:
        bits = [text[name].languages[language].bits_per_byte for name in (model, "base")]
        value, base = (measured.value if measured else math.nan for measured in bits)
        return value / base - 1

    def share(model: str, language: str) -> float:
        return fmean(routing[model].languages[language].shares["all_original_share"])

    def weight(model: str, language: str) -> float:
        return fmean(routing[model].languages[language].new_gate_weight or [math.nan])

    def measured(measure: Callable[[str, str], float], names: Sequence[str]) -> dict[str, list[float]]:
        return {language: [measure(name, language) for name in names] for language in LANGUAGES}

    return {
        setting: Results(label, measured(change, names), measured(share, names), measured(weight, names))
        for setting, (label, names) in names_of.items()
    }


def group_means(setting: Results, languages: Sequence[str]) -> list[float]:
    """The mean change over languages, per seed."""
    return [fmean(changes) for changes in zip(*(setting.change[language] for language in languages), strict=True)]


def results_tables(results: Frontier) -> str:
    """Markdown: means over languages with their range over seeds, then each language with its range."""
    means, languages = [], []
    titles = {"all choices original": "all_original_share", "weight of new experts": "new_gate_weight"}
    routing = {
        title: name for title, name in titles.items() if all(getattr(s, name) for s in results.settings.values())
    }
    for setting in results.settings.values():
        groups = [changes_of_seeds(group_means(setting, group)) for group in (ORIGINAL, EXPANDED)]
        means.append([setting.label, *groups, *(of_groups(getattr(setting, name)) for name in routing.values())])
        ranges = [value_range(setting.change[language]) for language in LANGUAGES]
        languages.append([setting.label, *ranges])
    names = [language_name(language) for language in LANGUAGES]
    tables = (
        Table(["", "mean original", "mean expanded", *routing], means),
        Table(["lowest to highest", *names], languages),
    )
    return "\n\n".join(map(markdown_table, tables))


def of_groups(values: Mapping[str, Sequence[float]]) -> str:
    """The means over seeds and languages: "43 / 20%" of original and of expanded languages."""
    original, expanded = (fmean(fmean(values[language]) for language in group) for group in (ORIGINAL, EXPANDED))
    return f"{original:.0%} / {expanded:.0%}".replace("% /", " /")


def changes_of_seeds(values: Sequence[float]) -> str:
    """The mean over seeds, with the lowest and the highest."""
    return f"{percent(fmean(values))} ({value_range(values)})"


def value_range(values: Sequence[float]) -> str:
    """ "−5.8% to −5.2%"."""
    return f"{percent(min(values))} to {percent(max(values))}"


def frontier_chart(results: Frontier) -> str:
    """Forgetting over learning after stage 2; one line per number of copies, over the values of gamma."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for setting in results.settings.values():
        copies, _, gamma = setting.label.partition(", \u03b3 ")
        if gamma:
            points = list(zip(group_means(setting, EXPANDED), group_means(setting, ORIGINAL), strict=True))
            series.setdefault(copies, {})[f"\u03b3 {gamma}"] = points
    return trade_off_chart(
        "Learning and forgetting after stage 2",
        [Series(name, settings) for name, settings in series.items()],
        x_axis="expanded languages: bits per byte against base",
        y_axis="original languages",
    )
