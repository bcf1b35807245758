"""Bits per byte and routing per language, from evaluations or from a run's validation passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from moelpr.base.errors import UserError
from moelpr.measure.report.evaluation_files import BenchmarkScore, Continuation, EvaluationFile, WrongLanguage
from moelpr.measure.report.numbers import Interval
from moelpr.measure.report.runs import Run
from moelpr.model.metrics.run_metrics import bits_of
from moelpr.model.metrics.schema import ROUTING_SHARES

GROUPS = ("expanded", "original")


@dataclass
class LanguageResults:
    """Bits per byte of models, in the order in which they were made: from evaluations, or from validation passes."""

    # Language -> "original" or "expanded"; "" if the evaluation did not name the original languages.
    groups: dict[str, str] = field(default_factory=dict)
    # Model -> language, "mean original" or "mean expanded" -> bits per byte.
    bits: dict[str, dict[str, Interval]] = field(default_factory=dict)
    # The same, relative to the first model; missing ones follow from `bits`.
    changes: dict[str, dict[str, Interval]] = field(default_factory=dict)
    has_start: bool = True  # the first model is the start that changes are measured against
    other_windows: list[str] = field(default_factory=list)  # models scored in windows of another length than the first
    per_token: set[str] = field(default_factory=set)  # languages of unknown size in bytes: their `bits` are per token
    # Name in ROUTING_SHARES -> model -> language -> fraction of tokens, per MoE layer.
    routing: dict[str, dict[str, dict[str, list[float]]]] = field(
        default_factory=lambda: {k: {} for k in ROUTING_SHARES}
    )
    layers: dict[str, list[int]] = field(default_factory=dict)  # model -> numbers of its MoE layers
    continuations: dict[str, Continuation] = field(default_factory=dict)
    wrong_language: dict[str, dict[str, WrongLanguage]] = field(default_factory=dict)
    # Benchmark -> model -> language -> score.
    benchmarks: dict[str, dict[str, dict[str, BenchmarkScore]]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(self.bits)

    def languages(self, *groups: str) -> list[str]:
        return [language for group in groups for language, its_group in self.groups.items() if its_group == group]

    def rows(self) -> dict[str, list[str]]:
        """Group -> its languages with results, then their mean if there is one."""
        known = {row for rows in self.bits.values() for row in rows}
        rows = {group: [*self.languages(group), f"mean {group}"] for group in (*GROUPS, "")}
        return {
            group: present for group, names in rows.items() if (present := [name for name in names if name in known])
        }

    def value(self, model: str, row: str) -> Interval:
        """Bits per byte; NaN if not measured."""
        return self.bits[model].get(row, Interval(math.nan))

    def change(self, model: str, row: str, reference: str | None = None) -> Interval:
        """Relative change against `reference`, by default the first model; NaN if one of them was not measured."""
        first = self.models[0]
        if reference in (None, first) and row in self.changes.get(model, {}):
            return self.changes[model][row]
        base = self.value(reference or first, row).value
        return Interval(self.value(model, row).value / base - 1 if base else math.nan)


def held_out_results(runs: Sequence[Run]) -> LanguageResults:
    """Collect the first validation pass of the first run that has one, and the last pass of every run.

    Runs may differ in languages. Where a run's windows, or the unit of a language, are not those of the first pass,
    there is no change (NaN).
    """
    results = LanguageResults(has_start=False)
    lengths: dict[str, int | None] = {}
    units: dict[str, str] = {}  # language -> unit of its first result
    for run in (run for run in runs if run.metrics.validations):
        first, last = run.metrics.validations[0], run.metrics.validations[-1]
        passes = {f"after {run.name}": last}
        if not results.bits and first["iteration"] == 0:  # in an old or truncated file the start is unknown
            results.has_start = True
            passes = {f"before {run.name}": first} | passes
        for name, record in passes.items():
            values = results.bits.setdefault(name, {})
            lengths[name] = run.settings.get("seq_length")
            has_other_windows = lengths[name] != next(iter(lengths.values()))
            if has_other_windows:
                results.other_windows.append(name)
            for language, result in record["languages"].items():
                results.groups[language] = result.get("group", "original")
                unit, bits = bits_of(result)
                if bits is not None:
                    values[language] = Interval(bits)
                    results.per_token |= {language} if unit == "bits per token" else set()
                    if has_other_windows or units.setdefault(language, unit) != unit:
                        results.changes.setdefault(name, {})[language] = Interval(math.nan)
    return results


def read_evaluations(paths: Sequence[Path]) -> LanguageResults:
    """Read files of --evaluation; later files add to earlier ones."""
    results, contents = LanguageResults(), [EvaluationFile.read(path) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        _add(results, content, path)
    averaged = {  # the languages of each mean, which are those of one file
        (model, group): {name for name in result.languages if GROUPS[name in content.original_languages] == group}
        for content in contents
        for model, result in content.models.items()
        for group in GROUPS
        if f"mean {group}" in result.means
    }
    for (model, group), languages in averaged.items():
        row, bits = f"mean {group}", results.bits.get(model, {})
        of_group = [name for name in results.languages(group) if name in bits]
        if row in bits and set(of_group) != languages:  # without an interval then
            bits[row] = Interval(fmean(bits[name].value for name in of_group) if of_group else math.nan)
            results.changes.get(model, {}).pop(row, None)
    return results


def _add(results: LanguageResults, content: EvaluationFile, path: Path) -> None:
    original = content.original_languages
    results.continuations |= content.continuations
    results.wrong_language |= content.wrong_language
    reference = next(iter(content.models), None)
    for model, result in content.models.items():
        for benchmark, scores in result.scores.items():
            results.benchmarks.setdefault(benchmark, {})[model] = scores
        for language in result.languages:
            results.groups[language] = GROUPS[language in original] if original else results.groups.get(language, "")
        for row, values in (result.languages | result.means).items():
            if values.bits_per_byte:
                results.bits.setdefault(model, {})[row] = values.bits_per_byte
            # Another file may compare with another model; changes against the first one then follow from `bits`.
            if "bits_per_byte" in values.change and reference == next(iter(results.bits), reference):
                results.changes.setdefault(model, {})[row] = values.change["bits_per_byte"]
            for share, per_layer in values.shares.items():
                results.routing[share].setdefault(model, {})[row] = per_layer
                layers = values.layers or list(range(len(per_layer)))
                if len(results.layers.setdefault(model, layers)) != len(per_layer):
                    raise UserError(
                        f"--evaluation {path}: the layers of {model} on {row} are not those of its other results; pass "
                        "files of one model under one name"
                    )
