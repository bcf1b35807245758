"""The headline: bits per byte of every language before training and after each run, and what changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moelpr.languages import language_name
from moelpr.report.document import Block, Cell, Row, Table, Text
from moelpr.report.evaluation import Estimate, Evaluation
from moelpr.report.runs import Run

_GROUPS = {"expanded": "Expanded languages", "original": "Original languages"}


@dataclass
class HeldOut:
    """From the runs' validation passes.

    results: when ("before stage1", "after stage1") -> language -> bits per byte, or per token. start: the first of
    these where it is a pass before any step, else None. per_token: languages whose bytes are not known.
    """

    groups: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    per_token: set[str] = field(default_factory=set)
    start: str | None = None


def held_out_results(runs: Sequence[Run]) -> HeldOut:
    """The first pass of the first run that has one, and the last pass of every run; runs may have other languages."""
    held_out = HeldOut()
    for run in runs:
        if not run.metrics.validations:
            continue
        first, last = run.metrics.validations[0], run.metrics.validations[-1]
        columns = {f"after {run.name}": last}
        if not held_out.results and first["iteration"] == 0:  # an older or a cut file: nobody knows the start
            held_out.start = f"before {run.name}"
            columns = {held_out.start: first} | columns
        for name, record in columns.items():
            values = held_out.results.setdefault(name, {})
            for language, result in record["languages"].items():
                held_out.groups[language] = result.get("group", "original")
                value = result.get("bits_per_byte")
                if value is None and result.get("bits_per_token") is not None:
                    value = result["bits_per_token"]
                    held_out.per_token.add(language)
                if value is not None:
                    values[language] = value
    return held_out


def language_table(evaluation: Evaluation, held_out: HeldOut) -> list[Block]:
    """Evaluated models with intervals where an evaluation was given, and the runs' own held-out text."""
    blocks: list[Block] = []
    if evaluation.bits_per_byte:
        blocks.append(_evaluation_table(evaluation))
    if held_out.results:
        blocks.append(_held_out_table(held_out))
    if not blocks:
        blocks.append(
            Text(
                "Nothing is known per language: train with --validation-data LANG=PREFIX, or evaluate the exports "
                "(python -m moelpr.evaluate) and give this report --evaluation FILE."
            )
        )
    return blocks


def summary(runs: Sequence[Run], evaluation: Evaluation, held_out: HeldOut) -> str:
    """One sentence: the mean change of each language group from the start to the end."""
    if evaluation.bits_per_byte and len(evaluation.bits_per_byte) > 1:
        models = list(evaluation.bits_per_byte)
        values = {
            name: {language: estimate.value for language, estimate in evaluation.bits_per_byte[name].items()}
            for name in (models[0], models[-1])
        }
        groups = {language: _group(language, evaluation) for language in evaluation.languages}
        source = f"on held-out documents, {models[-1]} against {models[0]}"
    elif held_out.start and len(held_out.results) > 1:
        last = list(held_out.results)[-1]
        values = {name: held_out.results[name] for name in (held_out.start, last)}
        groups, source = held_out.groups, f"on the runs' held-out text, from {held_out.start} to {last}"
    else:
        steps = sum(run.step for run in runs)
        return f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {steps:,} steps on record."
    start, end = values.values()
    sentences = []
    for group in _GROUPS:
        changes = [
            end[language] / start[language] - 1
            for language in groups
            if groups[language] == group and start.get(language) and language in end
        ]
        if changes:
            mean = sum(changes) / len(changes)
            names = ", ".join(language_name(name) for name in groups if groups[name] == group)
            sentences.append(f"{group} languages {change_text(mean)} ({names})")
    unit = "token" if held_out.per_token and not evaluation.bits_per_byte else "byte"
    return f"Bits per {unit} {source}: {'; '.join(sentences)}. Fewer is better."


def _group(language: str, evaluation: Evaluation) -> str:
    return "original" if language in evaluation.original_languages else "expanded"


def _evaluation_table(evaluation: Evaluation) -> Table:
    models = list(evaluation.bits_per_byte)
    groups = {language: _group(language, evaluation) for language in evaluation.languages}
    if not evaluation.original_languages:  # the evaluation was not told
        groups = dict.fromkeys(groups, "")
    rows = []
    for group in ("expanded", "original", ""):
        members = [language for language in groups if groups[language] == group]
        if members and group:
            rows.append(Row([_GROUPS[group]], "group"))
        for language in members:
            cells = [_evaluated(evaluation, model, language, models[0]) for model in models]
            rows.append(Row([language_name(language), *cells]))
    note = (
        f"Bits per byte on held-out documents, fewer is better, with the change against {models[0]}; in brackets 95% "
        "intervals, bootstrap over documents. A change whose interval holds 0 may be chance."
    )
    return Table(["evaluated", *models], rows, note)


def _evaluated(evaluation: Evaluation, model: str, language: str, reference: str) -> Cell:
    estimate = evaluation.bits_per_byte[model].get(language)
    if estimate is None or not math.isfinite(estimate.value):
        return Cell("–")
    text = _with_interval(estimate, "{:.3f}")
    if model == reference:
        return Cell(text)
    change = evaluation.changes.get(model, {}).get(language)
    base = evaluation.bits_per_byte[reference].get(language)
    if change is None and base is not None and base.value:
        change = Estimate(estimate.value / base.value - 1)
    if change is None:
        return Cell(text)
    return Cell(text, _with_interval(change, "{:+.1%}").replace("-", "\u2212"), change.value)


def _with_interval(estimate: Estimate, form: str) -> str:
    text = form.format(estimate.value)
    return f"{text} [{form.format(estimate.low)}, {form.format(estimate.high)}]" if estimate.has_interval else text


def _held_out_table(held_out: HeldOut) -> Table:
    names = list(held_out.results)
    rows = []
    for group, title in _GROUPS.items():
        members = [language for language, its_group in held_out.groups.items() if its_group == group]
        if members:
            rows.append(Row([title], "group"))
        for language in members:
            unit = " (bits per token)" if language in held_out.per_token else ""
            values = {name: held_out.results[name].get(language) for name in names}
            rows.append(Row([f"{language_name(language)}{unit}", *_held_out_cells(values, held_out.start)]))
    note = (
        "Bits per byte on the runs' --validation-data, packed into training's windows, fewer is better"
        + (f", with the change from {held_out.start}" if held_out.start else "")
        + ". No intervals: one pass over one text. Evaluation scores each document alone, so its numbers differ."
    )
    return Table(["held out while training", *names], rows, note)


def _held_out_cells(values: Mapping[str, float | None], start_name: str | None) -> list[Cell]:
    cells = []
    start = values.get(start_name) if start_name else None
    for name, value in values.items():
        if value is None:
            cells.append(Cell("–"))
        elif name == start_name or not start:
            cells.append(Cell(f"{value:.3f}"))
        else:
            cells.append(Cell(f"{value:.3f}", change_text(value / start - 1), value / start - 1))
    return cells


def change_text(change: float) -> str:
    return f"{100 * change:+.1f}%".replace("-", "\u2212")
