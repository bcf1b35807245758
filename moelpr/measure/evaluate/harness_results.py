"""Scores of models on benchmarks in the form of the paper's Table 1.

A row per model, a column per benchmark, a table per group of languages.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelpr.base.languages import language_name
from moelpr.measure.evaluate.benchmarks import Benchmark, Scores
from moelpr.measure.evaluate.confidence import Estimate, interval_of, mean
from moelpr.measure.evaluate.results import Results
from moelpr.measure.report.evaluation_files import BenchmarkRun, BenchmarkScore, EvaluationFile, ModelResult
from moelpr.measure.report.numbers import Interval, number_text, signed
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
        # model -> benchmark -> language -> standard error, or estimate
        self._errors, self._estimates = (
            {
                model: {
                    name: {code: getattr(benchmark, number)(code, by_task) for code in benchmark.tasks}
                    for name, benchmark in benchmarks.items()
                }
                for model, by_task in scores.items()
            }
            for number in ("stderr", "estimate")
        )

    def change(self, model: str, group: str) -> Interval | None:
        """The change of a group's average from the first model, paired by question; None for that model itself."""
        ours, theirs = self.means(model, group)[-1], self.means(self._reference, group)[-1]
        return None if model == self._reference or ours is None or theirs is None else interval_of(ours - theirs)

    def means(self, model: str, group: str) -> list[Estimate | None]:
        """The row of the paper's Table 1.

        It has the mean score per benchmark over the group's languages (None if it covers none), then their mean.
        """
        by_benchmark = [
            [estimate for language, estimate in estimates.items() if language in self._groups[group]]
            for estimates in self._estimates[model].values()
        ]
        means = [mean(estimates) if estimates else None for estimates in by_benchmark]
        known = [estimate for estimate in means if estimate is not None]
        return [*means, mean(known) if known else None]

    def _change(self, model: str, group: str) -> str:
        """The change of the average from the first model in words; "" for that model itself."""
        change = self.change(model, group)
        unclear = " unclear" if change and change.has_bounds and not change.is_clear else ""
        return change.text(signed) + unclear if change else ""

    def findings(self) -> list[str]:
        findings = [
            f"{group.capitalize()} languages: {model} has {_text(self.means(model, group)[-1])} on average, {change} "
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
        rows = [[model, *map(_text, self.means(model, group)), self._change(model, group)] for model in self._models]
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
        error = number_text(self._errors[model][name][code], "{:.2f}")
        score = f"{_text(self._estimates[model][name][code])} \u00b1 {error}"
        return score + (f"; {change.text(signed)}" if change else "")

    def _changes(self, model: str, name: str, code: str) -> Interval | None:
        if model == self._reference:
            return None
        return interval_of(self._estimates[model][name][code] - self._estimates[self._reference][name][code])

    def _score(self, model: str, name: str, code: str) -> BenchmarkScore:
        interval, change = interval_of(self._estimates[model][name][code]), self._changes(model, name, code)
        return BenchmarkScore(**vars(interval), stderr=self._errors[model][name][code], change=change)

    def numbers(self) -> EvaluationFile:
        models = {
            model: ModelResult(
                str(directory),
                scores={
                    name: {code: self._score(model, name, code) for code in estimates}
                    for name, estimates in self._estimates[model].items()
                },
                averages={
                    group: None if (average := self.means(model, group)[-1]) is None else average[0] for group in GROUPS
                },
                average_changes={g: change for g in GROUPS if (change := self.change(model, g))},
            )
            for model, directory in self._models.items()
        }
        benchmarks = {
            name: BenchmarkRun(benchmark.metric, benchmark.num_fewshot, benchmark.tasks)
            for name, benchmark in self._benchmarks.items()
        }
        return EvaluationFile(models, {**self._settings}, benchmarks=benchmarks, groups=self._groups)


def _text(estimate: Estimate | None) -> str:
    return number_text(None if estimate is None else estimate[0], "{:.2f}")
