"""The report of runs: learned and forgotten, routing, curves, cost, and how to repeat it."""

import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from moelpr.base.files import write_text
from moelpr.base.languages import language_name
from moelpr.measure.report import page, plots
from moelpr.measure.report.evaluation_files import BenchmarkScore, continuation_samples
from moelpr.measure.report.findings import Calibration
from moelpr.measure.report.language_results import LanguageResults, held_out_results
from moelpr.measure.report.numbers import Interval, finite_json, finite_mean, number_text, percent, signed
from moelpr.measure.report.page import Block, Cell, Row, Section, Table, Text
from moelpr.measure.report.run_figures import curve_figures, routing_figures
from moelpr.measure.report.runs import Run
from moelpr.model.metrics.schema import CONSUMED_TOKENS, GROUP_NAMES, LM_LOSS

MAX_WARNINGS = 30
_SAMPLE = "One sample per language illustrates the models; it does not measure them."
# Flags that say how a run was made; its recipe.yaml has all of them.
_SETTINGS = """
micro_batch_size global_batch_size seq_length lr lr_decay_style balance_loss_coeff lpr_loss_coeff num_original_experts
original_copies num_experts moe_router_topk data_path validation_data tensor_model_parallel_size
pipeline_model_parallel_size expert_model_parallel_size world_size seed
""".split()


@dataclass(frozen=True)
class Report:
    """The inputs of a report."""

    runs: Sequence[Run]  # in the order in which they were made, such as stage 1 and stage 2
    evaluation: LanguageResults = field(default_factory=LanguageResults)  # files of `moelpr evaluate`
    routers: Calibration | None = None  # routers in closed form

    def write(self, folder: Path) -> Path:
        """Write report.html, report.md and report.json into `folder`; returns the path of the HTML file."""
        held_out = held_out_results(self.runs)
        states = ["finished" if run.is_finished else f"{run.state} at step {run.progress}" for run in self.runs]
        title = ", ".join(f"{run.name} {state}" for run, state in zip(self.runs, states, strict=True))
        write_text(folder / "report.json", finite_json(_numbers(self, title, held_out), indent=1) + "\n")
        written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        kicker = f"Training report of {', '.join(str(run.folder) for run in self.runs)}, written {written}"
        return page.write_page(folder, "report", page.Page(title, kicker, _sections(self, held_out)))


def _sections(report: Report, held_out: LanguageResults) -> list[Section]:
    runs, evaluation = report.runs, report.evaluation
    return [
        Section("", [*_overview(report, held_out)]),
        Section("Learned and forgotten, per language", [*_language_tables(evaluation, held_out)]),
        Section("Benchmarks", [*_benchmark_tables(evaluation)]),
        Section("Routers in closed form", [*_router_tables(report.routers)]),
        Section("Routing: original or new experts", routing_figures(runs, evaluation)),
        Section("Curves", curve_figures(runs)),
        Section("Continuations", continuation_samples(evaluation.continuations, evaluation.wrong_language, _SAMPLE)),
        Section("Cost", [_cost_table(runs)]),
        Section("Settings", [*_settings(runs)]),
        Section("How to repeat it", [*_commands(runs)]),
    ]


def _summary(runs: Sequence[Run], evaluation: LanguageResults, held_out: LanguageResults) -> str:
    """One sentence: the mean change of each language group from the first model to the last."""
    results, source = evaluation, "on held-out documents"
    if len(evaluation.models) < 2:
        results, source = held_out, "on the runs' held-out text"
    steps = f"{_count(len(runs), 'run')}, {sum(run.step for run in runs):,} recorded steps."
    if len(results.models) < 2 or not results.has_start:
        return steps
    first, last = results.models[0], results.models[-1]
    parts = []
    for group in ("expanded", "original"):
        changes = {name: results.change(last, name).value for name in results.languages(group)}
        if known := [language_name(name) for name, change in changes.items() if math.isfinite(change)]:
            mean = results.change(last, f"mean {group}").value
            mean = mean if math.isfinite(mean) else finite_mean(changes.values())
            parts.append(f"{group} languages {percent(mean)} ({', '.join(known)})")
    if not parts:
        return steps
    unit = "token" if results.per_token else "byte"
    return f"Bits per {unit} {source}, {last} against {first}: {'; '.join(parts)}. Lower is better."


def _overview(report: Report, held_out: LanguageResults) -> Iterator[Block]:
    """The outcome in a few words, and what state the runs are in."""
    results, runs = report.evaluation, report.runs
    yield Text(_summary(runs, results, held_out), "summary")
    if len(results.models) > 1:
        reference, *models = results.models
        changes: dict[str, dict[str, Interval | None]] = {}
        for group, members in results.rows().items():
            changes |= {GROUP_NAMES[group].capitalize(): {}} if group else {}
            changes |= {language_name(row): {model: results.change(model, row) for model in models} for row in members}
        title = "Change in bits per byte on held-out text"
        note = (
            f"{title} against {reference}, with 95% intervals. A hollow bar is unclear: it has no interval without 0."
        )
        yield page.Figure([plots.change_chart(title, changes, axis=f"bits per byte against {reference}")], note)
    rows = []
    for run in runs:
        left = f", {_duration(run.time_left_s)} left" if run.state == "running" and run.time_left_s else ""
        loss = number_text(run.last.get(LM_LOSS), "{:.3f}")
        rows.append([run.name, run.stage, run.state + left, run.progress, loss, str(len(run.metrics.warnings))])
    yield Table(["run", "stage", "state", "steps", "last loss", "warnings"], rows, text_columns=[1, 2])
    warnings = [
        f"{run.name}, step {record['iteration']:,}: {record.get('message', '')}"
        for run in runs
        for record in run.metrics.warnings
    ]
    if warnings:
        title = f"{_count(len(warnings), 'warning')} during training."
        title += f" The first {MAX_WARNINGS}:" if len(warnings) > MAX_WARNINGS else ""
        yield page.Points(warnings[:MAX_WARNINGS], title)


def _benchmark_tables(evaluation: LanguageResults) -> Iterator[Block]:
    for name, by_model in evaluation.benchmarks.items():
        codes = dict.fromkeys(code for scores in by_model.values() for code in scores)
        rows = [
            [language_name(code), *(_score_text(scores.get(code)) for scores in by_model.values())] for code in codes
        ]
        yield Table([name, *by_model], rows)
    if evaluation.benchmarks:
        first = next(iter(next(iter(evaluation.benchmarks.values()))))
        note = f"Scores from 0 to 100; then the change against {first}, paired by question. In brackets: 95% intervals."
        yield Text(note, "note")


def _router_tables(routers: Calibration | None) -> Iterator[Block]:
    if routers is not None:
        yield Text(f"The routers {routers.findings.kept_text}.")
        yield from routers.findings.tables([*routers.experts])


def _score_text(score: BenchmarkScore | None) -> str:
    if score is None:
        return "–"
    return score.text("{:.1f}".format) + (f"; {score.change.text(signed)}" if score.change else "")


def _language_tables(evaluation: LanguageResults, held_out: LanguageResults) -> Iterator[Block]:
    """Evaluated models with intervals, and the runs' own held-out text."""
    if evaluation.bits:
        note = (
            f"Bits per byte on held-out documents, with the change against {evaluation.models[0]}; lower is better. In "
            "brackets 95% intervals, bootstrap over documents. A change whose interval contains 0 may be chance."
        )
        yield _results_table("evaluated", evaluation, note)
    if held_out.bits:
        since = f", with the change from {held_out.models[0]}" if held_out.has_start else ""
        note = (
            f"Bits per byte on the runs' --validation-data, packed into the windows of training{since}; lower is "
            "better. No intervals: one pass over one text. The evaluation scores each document separately, so "
            "its numbers differ."
        )
        if others := ", ".join(held_out.other_windows):
            note += f" No change is shown {others}: its windows (--seq-length) have another length."
        yield _results_table("held out while training", held_out, note)
    if not evaluation.bits and not held_out.bits:
        yield Text(
            "There are no results per language: train with --validation-data LANG=PREFIX, or evaluate the exports "
            "(moelpr evaluate) and pass the results to this report with --evaluation FILE."
        )


def _results_table(title: str, results: LanguageResults, note: str) -> Table:
    rows = []
    for group, members in results.rows().items():
        rows += [Row([GROUP_NAMES[group].capitalize()], "group")] if group else []
        for row in members:
            is_mean = row.startswith("mean ")
            name = "mean" if is_mean else language_name(row) + " (bits per token)" * (row in results.per_token)
            cells = []
            for model in results.models:
                value, change = results.value(model, row), results.change(model, row)
                text = value.text("{:.3f}".format) if math.isfinite(value.value) else "–"
                is_compared = model != results.models[0] and results.has_start and math.isfinite(change.value)
                cells.append(Cell(text, change.text(percent), change.value) if is_compared else Cell(text))
            rows.append(Row([name, *cells], "mean" if is_mean else ""))
    return Table([title, *results.models], rows, note)


def _cost_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        tokens, num_ranks = run.last.get(CONSUMED_TOKENS) or 0, run.num_ranks or run.settings.get("world_size")
        speed, memory = number_text(run.tokens_per_s, "{:,.0f}"), number_text(run.peak_memory_gib, "{:.2f} GiB")
        time_s = _duration(run.training_time_s)
        rows.append([run.name, f"{tokens:,}", time_s, speed, memory, str(num_ranks or "not recorded")])
    note = (
        "Training time: the sum of all recorded steps, each counted once, including saving but not validation. Tokens "
        "per second: the median of the steps. Memory: the peak of the rank that used the most."
    )
    return Table(["run", "tokens", "training time", "tokens/s", "memory per rank", "ranks"], rows, note)


def _settings(runs: Sequence[Run]) -> Iterator[Block]:
    facts: dict[str, dict[str, str]] = {}
    for run in runs:
        values = {name: run.settings.get(name) for name in _SETTINGS}
        values["versions"] = [f"{name} {version}" for name, version in run.versions.items()]
        facts[run.name] = {
            name.replace("_", "-"): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in values.items()
            if value is not None and value != []
        }
    yield page.Facts(facts)
    for run in runs:
        if run.settings:
            text = "\n".join(f"{name}: {value}" for name, value in run.settings.items() if value is not None)
            yield page.Code(text, f"Every setting of {run.name} with its final value", folded=True)


def _commands(runs: Sequence[Run]) -> Iterator[Block]:
    for run in runs:
        if run.arguments:
            num_ranks, per_node = run.num_ranks or 1, run.ranks_per_node or run.num_ranks or 1
            nodes = "--standalone"
            if num_ranks > per_node:
                nodes = f"--nnodes {num_ranks // per_node} --node-rank RANK --master-addr FIRST-NODE"
            ranks = f" --nproc-per-node {per_node}" if num_ranks > 1 else ""
            command = f"python -m moelpr.torchrun {nodes}{ranks} -m moelpr.pretrain {shlex.join(run.arguments)}"
            lines = f".venv/bin/{command}".replace(" --", " \\\n    --")
            yield page.Code(lines, f"{run.name}, from the repository's folder, with another --save:")
    if missing := ", ".join(run.name for run in runs if not run.arguments):
        yield Text(f"No command line was recorded for {missing}; recipe.yaml has every setting.", "note")


def _numbers(report: Report, title: str, held_out: LanguageResults) -> dict[str, Any]:
    """The content of report.json."""
    evaluation = report.evaluation
    shares = {
        model: {name: {"overall": finite_mean(values), "per_layer": values} for name, values in by_name.items()}
        for model, by_name in evaluation.routing["original_first_share"].items()
    }
    return {
        "title": title,
        "languages": evaluation.groups,
        "bits_per_byte": _by_model(evaluation, evaluation.value),
        "change": _by_model(evaluation, evaluation.change),
        "routing": {"layers": evaluation.layers, "original_expert_share": shares}
        | {"all_original_share": evaluation.routing["all_original_share"]},
        "held_out": _by_model(held_out, held_out.value),
        "runs": {run.name: _run_numbers(run) for run in report.runs},
        "routers": report.routers,
        "continuations": evaluation.continuations,
        "benchmarks": evaluation.benchmarks,
        "wrong_language": evaluation.wrong_language,
    }


def _run_numbers(run: Run) -> dict[str, Any]:
    names = ("stage", "state", "step", "num_steps", "training_time_s", "tokens_per_s", "peak_memory_gib", "num_ranks")
    return {
        "folder": str(run.folder),
        "tokens": run.last.get(CONSUMED_TOKENS),
        LM_LOSS: run.last.get(LM_LOSS),
        **{name: getattr(run, name) for name in (*names, "settings", "versions", "arguments")},
        "warnings": run.metrics.warnings,
    }


def _by_model(results: LanguageResults, number: Callable[..., Interval]) -> dict[str, dict[str, Interval]]:
    return {model: {row: number(model, row) for row in rows} for model, rows in results.bits.items()}


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number > 1 else ''}"
