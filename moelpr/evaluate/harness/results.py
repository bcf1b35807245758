"""Benchmark scores in the shape of the paper's Table 1: a row a model, a column a benchmark, a table a group."""

from pathlib import Path
from statistics import fmean
from typing import Any

from moelpr.errors import UserError
from moelpr.evaluate.harness.run import Scores
from moelpr.evaluate.harness.tasks import Benchmark
from moelpr.evaluate.tables import Table
from moelpr.languages import language_name
from moelpr.report.svg import Drawing

GROUPS = ("expanded", "original")


class HarnessResults:
    """Scores from 0 to 100. The first model is what the others are compared with."""

    def __init__(
        self,
        models: dict[str, Path],
        benchmarks: list[Benchmark],
        languages: list[str],
        original: list[str],
        scores: Scores,
        settings: dict[str, Any],
    ):
        self._models, self._benchmarks, self._settings = models, benchmarks, settings
        self._groups = {
            "expanded": [language for language in languages if language not in original],
            "original": [language for language in languages if language in original],
        }
        # model -> benchmark -> language -> (score, its standard error)
        self._scores = {
            model: {
                benchmark.name: {
                    language: _language_score(benchmark, tasks, scores[model])
                    for language, tasks in benchmark.tasks.items()
                }
                for benchmark in benchmarks
            }
            for model in models
        }

    def benchmark_mean(self, model: str, benchmark: str, group: str) -> float | None:
        """Mean over the group's languages that the benchmark has; None where it has none."""
        scores = self._scores[model][benchmark]
        found = [scores[language][0] for language in self._groups[group] if language in scores]
        return fmean(found) if found else None

    def average(self, model: str, group: str) -> float | None:
        """Mean of the benchmarks' means, as in the paper's Table 1."""
        means = [self.benchmark_mean(model, benchmark.name, group) for benchmark in self._benchmarks]
        found = [value for value in means if value is not None]
        return fmean(found) if found else None

    def findings(self) -> list[str]:
        reference, *others = self._models
        sentences = []
        for group in GROUPS:
            base = self.average(reference, group)
            for model in others:
                ours = self.average(model, group)
                if ours is not None and base is not None:
                    sentences.append(
                        f"{group.capitalize()} languages: {model} has {ours:.2f} on average, {_signed(ours - base)} "
                        f"against {reference}."
                    )
        for benchmark in self._benchmarks:
            lacking = [
                language_name(language)
                for languages in self._groups.values()
                for language in languages
                if language not in benchmark.tasks
            ]
            if lacking:
                sentences.append(f"{benchmark.name} has no task for {', '.join(lacking)}.")
        return sentences

    def tables(self) -> list[Table]:
        groups = [group for group in GROUPS if self._groups[group]]
        return [self._group_table(group) for group in groups] + [self._language_table(b) for b in self._benchmarks]

    def _group_table(self, group: str) -> Table:
        reference = next(iter(self._models))
        base = self.average(reference, group)
        rows = []
        for model in self._models:
            average = self.average(model, group)
            change = "" if model == reference or average is None or base is None else _signed(average - base)
            means = [self.benchmark_mean(model, benchmark.name, group) for benchmark in self._benchmarks]
            rows.append([model, *map(_number, means), _number(average), change])
        header = [f"{benchmark.name} ({benchmark.num_fewshot})" for benchmark in self._benchmarks]
        return Table(
            f"{group.capitalize()} languages",
            ["model", *header, "average", f"against {reference}"],
            rows,
            f"Means over {', '.join(map(language_name, self._groups[group]))}, as far as a benchmark has them; in "
            "brackets: shots.",
        )

    def _language_table(self, benchmark: Benchmark) -> Table:
        rows = [
            [model, *(f"{score:.2f} \u00b1 {error:.2f}" for score, error in scores[benchmark.name].values())]
            for model, scores in self._scores.items()
        ]
        names = ", ".join(name for tasks in benchmark.tasks.values() for name in tasks)
        limit = self._settings["limit"]
        return Table(
            f"{benchmark.name}, {benchmark.num_fewshot} shots, {benchmark.metric}",
            ["model", *benchmark.tasks],
            rows,
            f"\u00b1 one standard error. Tasks: {names}."
            + (f" Only the first {limit} questions of each: no result to publish." if limit else ""),
        )

    def pictures(self) -> dict[str, tuple[Drawing, str]]:
        return {}

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "groups": self._groups,
            "benchmarks": {
                benchmark.name: {
                    "num_fewshot": benchmark.num_fewshot,
                    "metric": benchmark.metric,
                    "tasks": {language: list(tasks) for language, tasks in benchmark.tasks.items()},
                }
                for benchmark in self._benchmarks
            },
            "models": {
                model: {
                    "directory": str(directory),
                    "scores": {
                        benchmark: {
                            language: {"value": score, "stderr": error} for language, (score, error) in scores.items()
                        }
                        for benchmark, scores in self._scores[model].items()
                    },
                    "averages": {group: self.average(model, group) for group in GROUPS},
                }
                for model, directory in self._models.items()
            },
        }


def _language_score(
    benchmark: Benchmark, tasks: tuple[str, ...], found: dict[str, dict[str, float]]
) -> tuple[float, float]:
    for task in tasks:
        if benchmark.metric not in found[task]:
            metrics = [name for name in found[task] if not name.endswith("_stderr")]
            raise UserError(
                f"the task {task} has no {benchmark.metric} among its results ({', '.join(metrics)}); correct the "
                f"metric of {benchmark.name} in the table of tasks"
            )
    scores = [found[task][benchmark.metric] for task in tasks]
    errors = [found[task].get(f"{benchmark.metric}_stderr", 0.0) for task in tasks]
    return benchmark.scale * fmean(scores), benchmark.scale * sum(error**2 for error in errors) ** 0.5 / len(errors)


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")
