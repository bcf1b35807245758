"""Scores of models on benchmarks in the form of the paper's Table 1.

A row per model, a column per benchmark, a table per group of languages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from moelpr.base.languages import language_name
from moelpr.measure.evaluate.benchmarks import Benchmark, Scores
from moelpr.measure.evaluate.confidence import Estimate, interval_of, mean
from moelpr.measure.evaluate.result_cache import Json
from moelpr.measure.evaluate.results import Results
from moelpr.measure.report.numbers import Interval, signed
from moelpr.measure.report.page import Table

GROUPS = ("expanded", "original")


class HarnessResults(Results):
    """Scores from 0 to 100; the first model is the reference."""

    name, title = "harness", "Benchmarks"

    def __init__(
        self,
        models: Mapping[str, Path],
        benchmarks: Mapping[str, Benchmark],
        languages: Sequence[str],
        original: Sequence[str],
        scores: Scores,
        settings: Mapping[str, Any],
    ) -> None:
        self._models, self._benchmarks, self._settings = models, benchmarks, settings
        self._reference = next(iter(models))
        self._groups = {
            group: [language for language in languages if (language in original) == (group == "original")]
            for group in GROUPS
        }
        # model -> benchmark -> language -> {value, stderr}
        self._scores = {
            model: {
                name: {code: benchmark.score(code, found) for code in benchmark.tasks}
                for name, benchmark in benchmarks.items()
            }
            for model, found in scores.items()
        }
        self._estimates = {
            model: {
                name: {code: benchmark.estimate(code, found) for code in benchmark.tasks}
                for name, benchmark in benchmarks.items()
            }
            for model, found in scores.items()
        }

    def _average(self, model: str, group: str) -> Estimate | None:
        """The average of a group: the mean over benchmarks of means over languages; None if there is no score."""
        by_benchmark = [
            [found for language, found in by_language.items() if language in self._groups[group]]
            for by_language in self._estimates[model].values()
        ]
        means = [mean(found) for found in by_benchmark if found]
        return mean(means) if means else None

    def change(self, model: str, group: str) -> Interval | None:
        """The change of a group's average from the first model, paired by question; None for that model itself."""
        ours, theirs = self._average(model, group), self._average(self._reference, group)
        return None if model == self._reference or ours is None or theirs is None else interval_of(ours - theirs)

    def means(self, model: str, group: str) -> list[float | None]:
        """The row of the paper's Table 1.

        It has the mean score per benchmark over the group's languages (None if it covers none), then their mean.
        """
        by_benchmark = [
            [score["value"] for language, score in scores.items() if language in self._groups[group]]
            for scores in self._scores[model].values()
        ]
        means = [fmean(values) if values else None for values in by_benchmark]
        found = [mean for mean in means if mean is not None]
        return [*means, fmean(found) if found else None]

    def _change(self, model: str, group: str) -> str:
        """The change of the average from the first model in words; "" for that model itself."""
        found = self.change(model, group)
        unclear = " unclear" if found and found.has_bounds and not found.is_clear else ""
        return found.text(signed) + unclear if found else ""

    def findings(self) -> list[str]:
        findings = [
            f"{group.capitalize()} languages: {model} has {self.means(model, group)[-1]:.2f} on average, {change} "
            f"against {self._reference}."
            for group in GROUPS
            for model in self._models
            if (change := self._change(model, group))
        ]
        for name, benchmark in self._benchmarks.items():
            languages = [language for group in self._groups.values() for language in group]
            if missing := [language_name(language) for language in languages if language not in benchmark.tasks]:
                findings.append(f"{name} has no task for {', '.join(missing)}.")
        return findings

    def tables(self) -> dict[str, Table]:
        groups = {
            f"{group.capitalize()} languages": self._group_table(group) for group in GROUPS if self._groups[group]
        }
        return groups | {
            f"{name}, {benchmark.num_fewshot} shots, {benchmark.metric}": self._language_table(name, benchmark)
            for name, benchmark in self._benchmarks.items()
        }

    def _group_table(self, group: str) -> Table:
        rows = []
        for model in self._models:
            cells = ["\u2013" if mean is None else f"{mean:.2f}" for mean in self.means(model, group)]
            rows.append([model, *cells, self._change(model, group)])
        header = [f"{name} ({benchmark.num_fewshot})" for name, benchmark in self._benchmarks.items()]
        names = ", ".join(map(language_name, self._groups[group]))
        note = (
            f"Means over {names}, as far as a benchmark has them; in parentheses: shots; in brackets: 95% confidence "
            "intervals, paired by question. A change whose interval contains 0 is unclear."
        )
        return Table(["model", *header, "average", f"against {self._reference}"], rows, note)

    def _language_table(self, name: str, benchmark: Benchmark) -> Table:
        rows = [[model, *(self._cell(model, name, code) for code in benchmark.tasks)] for model in self._models]
        names = ", ".join(task for tasks in benchmark.tasks.values() for task in tasks)
        limit = self._settings["limit"]
        warning = f" Only the first {limit} questions of each task: do not publish these numbers." if limit else ""
        note = f"\u00b1 one standard error; then the change against {self._reference} with its 95% interval."
        return Table(["model", *benchmark.tasks], rows, f"{note} Tasks: {names}.{warning}")

    def _cell(self, model: str, name: str, code: str) -> str:
        change = self._changes(model, name, code)
        return _with_error(self._scores[model][name][code]) + (f"; {change.text(signed)}" if change else "")

    def _changes(self, model: str, name: str, code: str) -> Interval | None:
        if model == self._reference:
            return None
        return interval_of(self._estimates[model][name][code] - self._estimates[self._reference][name][code])

    def _score_json(self, model: str, name: str, code: str) -> Json:
        found, change = interval_of(self._estimates[model][name][code]), self._changes(model, name, code)
        clear = {"change": asdict(change) | {"is_clear": change.is_clear}} if change else {}
        return self._scores[model][name][code] | {"low": found.low, "high": found.high} | clear

    def to_json(self) -> dict[str, Any]:
        include_path = self._settings["include_path"]
        return {
            "settings": {**self._settings, "include_path": include_path and str(include_path)},
            "groups": self._groups,
            "benchmarks": {name: asdict(benchmark) for name, benchmark in self._benchmarks.items()},
            "models": {
                model: {
                    "directory": str(directory),
                    "scores": {
                        name: {code: self._score_json(model, name, code) for code in found}
                        for name, found in self._scores[model].items()
                    },
                    "averages": {group: self.means(model, group)[-1] for group in GROUPS},
                    "average_changes": {g: asdict(found) for g in GROUPS if (found := self.change(model, g))},
                }
                for model, directory in self._models.items()
            },
        }


def _with_error(score: Mapping[str, float]) -> str:
    stderr = "\u2013" if math.isnan(score["stderr"]) else f"{score['stderr']:.2f}"
    return f"{score['value']:.2f} \u00b1 {stderr}"
