"""Bits per byte and routing per language, from evaluations or from a run's validation passes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from moelpr.metrics.run_metrics import bits_of
from moelpr.metrics.schema import ROUTING_SHARES
from moelpr.process.errors import UserError
from moelpr.report.numbers import Interval
from moelpr.report.runs import Run
from moelpr.store.files import parse_json

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
    # Language -> {"prompt", "reference", "by_model": model -> text}.
    continuations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(self.bits)

    def languages(self, *groups: str) -> list[str]:
        return [language for group in groups for language, its_group in self.groups.items() if its_group == group]

    def rows(self) -> dict[str, list[str]]:
        """Group -> its languages with results, then their mean if there is one."""
        known = {row for rows in self.bits.values() for row in rows}
        rows = {group: [*self.languages(group), f"mean {group}"] for group in (*GROUPS, "")}
        return {group: found for group, names in rows.items() if (found := [name for name in names if name in known])}

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
    """The first validation pass of the first run that has one, and the last pass of every run.

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


def read_evaluations(paths: Iterable[Path]) -> LanguageResults:
    """All files together, later ones adding to earlier ones. Raises UserError for a file of something else."""
    results = LanguageResults()
    averaged: dict[str, dict[str, set[str]]] = {}  # model -> group with a mean -> the mean's languages
    for path in paths:
        with named_input("--evaluation", path, "a JSON file that `python -m moelpr.evaluate` wrote"):
            content = parse_json(path.read_bytes())
            _add(results, content)
            for model, result in content["models"].items():
                for group in GROUPS:
                    if f"mean {group}" in (result.get("means") or {}):
                        languages = {name for name in result["languages"] if results.groups[name] == group}
                        averaged.setdefault(model, {})[group] = languages
    for model, by_group in averaged.items():
        for group, languages in by_group.items():
            _average_again(results, model, group, languages)
    return results


def _average_again(results: LanguageResults, model: str, group: str, languages: set[str]) -> None:
    """Replace a mean over `languages`, those of one file, if the group has others: by a value without an interval."""
    row, bits = f"mean {group}", results.bits.get(model, {})
    of_group = [name for name in results.languages(group) if name in bits]
    if row in bits and set(of_group) != languages:
        bits[row] = Interval(fmean(bits[name].value for name in of_group) if of_group else math.nan)
        results.changes.get(model, {}).pop(row, None)


@contextmanager
def named_input(flag: str, path: Path, expected: str) -> Iterator[None]:
    """A file that is missing or not what is expected becomes a UserError that names its flag."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{flag} {path} must be {expected} ({error})") from error


def _add(results: LanguageResults, content: Mapping[str, Any]) -> None:
    if not isinstance(original := content.get("original_languages") or [], list):
        raise TypeError("original_languages must be a list")
    reference = next(iter(content["models"]), None)
    for language, sample in (content.get("continuations") or {}).items():
        texts = sample["prompt"], sample["reference"], *sample["by_model"].values()
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the continuation of {language} is not text")
        results.continuations[language] = sample
    for model, result in content["models"].items():
        for language in result["languages"]:
            results.groups[language] = GROUPS[language in original] if original else results.groups.get(language, "")
        for row, values in {**result["languages"], **(result.get("means") or {})}.items():
            if "bits_per_byte" in values:
                results.bits.setdefault(model, {})[row] = _interval(values["bits_per_byte"])
            # Another file may compare with another model; changes against the first one then follow from `bits`.
            if "bits_per_byte" in (values.get("change") or {}) and reference == next(iter(results.bits), reference):
                results.changes.setdefault(model, {})[row] = _interval(values["change"]["bits_per_byte"])
            share = values.get("original_expert_share") or {}
            if per_layer := values.get("original_first_share") or share.get("per_layer"):
                results.routing["original_first_share"].setdefault(model, {})[row] = _floats(per_layer)
                layers = list(values.get("layers") or share.get("layers") or range(len(per_layer)))
                if not len(per_layer) == len(layers) == len(results.layers.setdefault(model, layers)):
                    raise ValueError(f"the layers of {model} on {row} are not those of its other results")
            if per_layer := values.get("all_original_share"):
                results.routing["all_original_share"].setdefault(model, {})[row] = _floats(per_layer)
                if len(per_layer) != len(results.layers.get(model, per_layer)):
                    raise ValueError(f"the layers of {model} on {row} are not those of its other results")


def _interval(content: Any) -> Interval:
    """From value, low and high, or from a plain number, as older versions wrote it."""
    is_plain = not isinstance(content, Mapping)
    return Interval(*_floats([content] if is_plain else [content.get(name) for name in Interval._fields]))


def _floats(values: Iterable[float | None]) -> list[float]:
    numbers = [math.nan if value is None else float(value) for value in values]
    return [number if math.isfinite(number) else math.nan for number in numbers]
