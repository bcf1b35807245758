"""The report of runs: learned and forgotten, claims, routing, curves, cost, and how to repeat it."""

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from moelpr.files import atomic_file
from moelpr.languages import language_name
from moelpr.report import page, plots
from moelpr.report.claims import Claims, Judgment, check_result
from moelpr.report.language_results import ROUTING_SHARES, LanguageResults, held_out_results
from moelpr.report.page import Block, Cell, Row, Section, Table, Text
from moelpr.report.runs import ENDS, Run, curve_of

MAX_WARNINGS = 30
GROUP_NAMES = {"original": "original languages", "expanded": "expanded languages"}
# Flags that say how a run was made; its recipe.yaml has all of them.
_SETTINGS = (
    "micro_batch_size", "global_batch_size", "seq_length", "lr", "lr_decay_style", "balance_loss_coeff",
    "lpr_loss_coeff", "num_original_experts", "original_copies", "num_experts", "moe_router_topk", "data_path",
    "validation_data", "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "world_size", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Everything a report is made from."""

    runs: Sequence[Run]  # in the order in which they were made, such as stage 1 and stage 2
    evaluation: LanguageResults = field(default_factory=LanguageResults)  # of `python -m moelpr.evaluate`
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> result of verify.py
    claims: Claims = field(default_factory=Claims)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # title -> name -> value, after the settings

    def write(self, folder: Path) -> Path:
        """Write report.html, report.md and report.json into `folder`; returns the path of the HTML file."""
        judgments = self.claims.judge(self.evaluation, self.checks)
        held_out = held_out_results(self.runs)
        title = _title(self.runs, self.claims, judgments)
        with atomic_file(folder / "report.json") as temporary:
            numbers = json.dumps(_numbers(self, title, judgments, held_out))
            content = json.loads(numbers, parse_constant=lambda _: None)  # JSON has neither NaN nor Inf
            text = json.dumps(content, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        kicker = f"Training report of {', '.join(str(run.folder) for run in self.runs)}, written {written}"
        return page.write_page(folder, "report", page.Page(title, kicker, _sections(self, judgments, held_out)))


def _sections(report: Report, judgments: Sequence[Judgment], held_out: LanguageResults) -> list[Section]:
    runs, evaluation = report.runs, report.evaluation
    return [
        Section("", [*_overview(report, judgments, held_out)]),
        Section("Learned and forgotten, per language", [*_language_tables(evaluation, held_out)]),
        Section("Claims", _claims_table(report.claims, judgments)),
        Section("Checks", _checks_table(report)),
        Section("Routing: original or new experts", _routing(runs, evaluation)),
        Section("Curves", _curves(runs)),
        Section("Continuations", _continuations(evaluation)),
        Section("Cost", [_cost_table(runs)]),
        Section("Settings", [*_settings(report)]),
        Section("How to repeat it", [*_commands(runs)]),
    ]


def _title(runs: Sequence[Run], claims: Claims, judgments: Sequence[Judgment]) -> str:
    """The claims' own title only if every claim is shown."""
    if judgments:
        shown = sum(judgment.ok for judgment in judgments)
        is_proven = shown == len(judgments) and claims.title
        return claims.title if is_proven else f"{shown} of {len(judgments)} claims are shown"
    return ", ".join(
        f"{run.name} " + ("finished" if run.is_finished else f"{run.state} at step {run.progress}") for run in runs
    )


def _summary(runs: Sequence[Run], evaluation: LanguageResults, held_out: LanguageResults) -> str:
    """One sentence: the mean change of each language group from the first model to the last."""
    results, source = evaluation, "on held-out documents"
    if len(evaluation.models) < 2:
        results, source = held_out, "on the runs' held-out text"
    if len(results.models) < 2 or not results.has_start:
        return f"{_count(len(runs), 'run')}, {sum(run.step for run in runs):,} recorded steps."
    first, last = results.models[0], results.models[-1]
    parts = []
    for group in ("expanded", "original"):
        changes = {name: results.change(last, name).value for name in results.languages(group)}
        if known := [language_name(name) for name, change in changes.items() if math.isfinite(change)]:
            mean = results.change(last, f"mean {group}").value
            mean = mean if math.isfinite(mean) else plots.finite_mean(changes.values())
            parts.append(f"{group} languages {plots.percent(mean)} ({', '.join(known)})")
    unit = "token" if results.per_token else "byte"
    return f"Bits per {unit} {source}, {last} against {first}: {'; '.join(parts)}. Lower is better."


def _overview(report: Report, judgments: Sequence[Judgment], held_out: LanguageResults) -> Iterator[Block]:
    """The outcome in a few words, and what state the runs are in."""
    results, runs = report.evaluation, report.runs
    yield Text(_summary(runs, results, held_out), "summary")
    if judgments:
        missed = [judgment for judgment in judgments if not judgment.ok]
        details = f": {len(judgments) - len(missed)} of {len(judgments)}{'; these are not' if missed else ''}."
        items = [f"{language_name(m.language) or m.name}: {m.found}; claim: {m.claim}" for m in missed]
        yield page.Verdict("Not every claim is shown" if missed else "Every claim is shown", details, items)
        if report.claims.note:
            yield Text(report.claims.note)
    if len(results.models) > 1:
        reference, *models = results.models
        changes: dict[str, dict[str, plots.Interval | None]] = {}
        for group, members in results.rows().items():
            changes |= {GROUP_NAMES[group].capitalize(): {}} if group else {}
            changes |= {language_name(row): {model: results.change(model, row) for model in models} for row in members}
        title = "Change in bits per byte on held-out text"
        note = f"{title} against {reference}, with 95% intervals. A hollow bar is unclear: its interval contains 0."
        yield page.Figure([plots.change_chart(title, changes, axis=f"bits per byte against {reference}")], note)
    rows = []
    for run in runs:
        left = f", {_duration(run.time_left_s)} left" if run.state == "running" and run.time_left_s else ""
        loss = _number(run.last.get("lm_loss"), "{:.3f}")
        rows.append([run.name, run.stage, run.state + left, run.progress, loss, str(len(run.metrics.warnings))])
    yield Table(["run", "stage", "state", "steps", "last loss", "warnings"], rows, text_columns=[1, 2])
    warnings = [
        f"{run.name}, step {record['iteration']:,}: {record.get('message', '')}"
        for run in runs
        for record in run.metrics.warnings
    ]
    if warnings:
        more = f" The first {MAX_WARNINGS} of {len(warnings)}." if len(warnings) > MAX_WARNINGS else ""
        title = f"{_count(len(warnings), 'warning')} during training."
        yield page.Verdict(title, more, warnings[:MAX_WARNINGS])


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
        yield _results_table("held out while training", held_out, note)
    if not evaluation.bits and not held_out.bits:
        yield Text(
            "There are no results per language: train with --validation-data LANG=PREFIX, or evaluate the exports "
            "(python -m moelpr.evaluate) and pass the results to this report with --evaluation FILE."
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
                cells.append(Cell(text, change.text(plots.percent), change.value) if is_compared else Cell(text))
            rows.append(Row([name, *cells], "mean" if is_mean else ""))
    return Table([title, *results.models], rows, note)


def _claims_table(claims: Claims, judgments: Sequence[Judgment]) -> list[Block]:
    rows = []
    for claim in claims.claims:
        found = [
            Cell(f"{language_name(judgment.language)}: {judgment.found}", ok=judgment.ok)
            for judgment in judgments
            if judgment.language and judgment.name == claim["name"]
        ]
        rows.append(Row([Cell(claim["name"].replace("_", " ").capitalize(), claim["claim"]), found]))
    return [Table(["claim", "found, in bits per byte"], rows, text_columns=[1])] if rows else []


def _checks_table(report: Report) -> list[Block]:
    meanings = report.claims.checks
    rows = []
    for name in dict.fromkeys([*meanings, *report.checks]):
        check = report.checks.get(name, {})
        found = Cell(check_result(check), ok=check.get("equal", False))
        same = _number(check.get("same_next_token"), "{:.2%}")
        title = Cell(meanings[name], name) if name in meanings else name
        rows.append(Row([title, found, f"{check.get('num_tensors', 0):,}", same]))
    note = (
        "Measured by checkpoint_convert/verify.py. Shown: equal within its tolerances, by default 0 for a tensor and "
        "1e-4 for a logit."
    )
    return [Table(["check", "found", "tensors", "same next token"], rows, note, text_columns=[1])] if rows else []


def _continuations(evaluation: LanguageResults) -> list[Block]:
    note = (
        "The first words of a held-out document, continued by each model. One sample per language illustrates the "
        "models; it does not measure them."
    )
    samples = [
        page.Sample(
            language, language_name(language), sample["prompt"],
            {**sample["by_model"], "the text itself": sample["reference"]},
        )
        for language, sample in evaluation.continuations.items()
    ]  # fmt: skip
    return [Text(note, "note"), *samples] if samples else []


def _curves(runs: Sequence[Run]) -> list[Block]:
    charts, drawn = [], []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for title, curves, as_percent, smooth in _charts_of(run):
            if chart := plots.line_chart(prefix + title, curves, as_percent=as_percent, smooth=smooth):
                charts.append(chart)
                drawn += curves if smooth else []
    if not charts:
        return [Text("There are no curves yet: a curve needs two steps.", "note")]
    return [page.Figure(charts, plots.thinning_note(drawn), _curves_table(runs), is_grid=True)]


def _charts_of(run: Run) -> Iterator[tuple[str, list[plots.Curve], bool, bool]]:
    """Everything that was logged: title, curves, whether they are fractions, whether to smooth them."""
    validations = run.metrics.validations
    groups = {name: result.get("group") for record in validations for name, result in record["languages"].items()}
    for unit in ("byte", "token"):
        bits = [
            {name: result.get(f"bits_per_{unit}") for name, result in record["languages"].items()}
            | {"iteration": record["iteration"]}
            for record in validations
        ]
        for group, title in GROUP_NAMES.items():
            curves = [curve_of(bits, name, language_name(name)) for name in groups if groups[name] == group]
            yield f"held-out text, {title} (bits per {unit})", curves, False, False
    steps = run.metrics.steps
    losses = [curve_of(steps, f"lm_loss_{group}", name) for group, name in GROUP_NAMES.items()]
    has_losses = all(curve.y for curve in losses)
    yield "next-token loss (nats per token)", losses if has_losses else [curve_of(steps, "lm_loss")], False, True
    yield "balance loss", [curve_of(steps, "balance_loss")], False, True
    yield "LPR loss (nats)", [curve_of(steps, "lpr_loss")], False, True
    for share, title in ROUTING_SHARES.items():
        curves = [curve_of(steps, f"{share}_{group}", name) for group, name in GROUP_NAMES.items()]
        yield f"tokens whose {title}", [curve for curve in curves if any(curve.y)], True, True
    yield "gradient norm", [curve_of(steps, "grad_norm")], False, True
    yield "learning rate", [curve_of(steps, "learning_rate")], False, False
    yield "tokens per second", [curve_of(steps[1:], "tokens_per_s")], False, True


def _curves_table(runs: Sequence[Run], num_rows: int = 8) -> Table:
    """The curves in a few numbers, each the mean over a part of the run."""
    names = {"lm_loss": "loss", "balance_loss": "balance", "lpr_loss": "LPR", "tokens_per_s": "tokens/s"}
    rows = []
    for run in runs:
        steps = run.metrics.steps
        size = max(1, math.ceil(len(steps) / num_rows))
        for part in (steps[start : start + size] for start in range(0, len(steps), size)):
            means = [_number(plots.finite_mean(curve_of(part, name).y), "{:.4g}") for name in names]
            rows.append([f"{run.name}, steps {part[0]['iteration']:,} to {part[-1]['iteration']:,}", *means])
    return Table(["mean over", *names.values()], rows)


def _routing(runs: Sequence[Run], evaluation: LanguageResults) -> list[Block]:
    """Of evaluated models, per language of the held-out text; before and after review, on the training text."""
    figures: list[Block] = []
    for share, title in ROUTING_SHARES.items():
        evaluated = []
        for model, shares in evaluation.routing[share].items():
            languages = [name for name in evaluation.languages("original", "expanded", "") if name in shares]
            columns = {language_name(name): [*shares[name], plots.finite_mean(shares[name])] for name in languages}
            rows = [f"layer {layer}" for layer in evaluation.layers[model]]
            evaluated.append(plots.Panel(model, columns, [*rows, "mean"]))
        captions = (
            f"Fraction of held-out tokens whose {title}, per MoE layer and language.",
            f"Fraction of training tokens whose {title}, per MoE layer and language group, over at most {ENDS} steps. "
            "Review (stage 2) teaches the routers to send original-language text there.",
        )
        for panels, text in zip(
            (evaluated, [p for run in runs for p in _run_panels(run, share)]), captions, strict=True
        ):
            if any(value > 0 for panel in panels for column in panel.columns.values() for value in column):
                figures.append(_heat_map_figure(panels, text, title))
    return figures


def _run_panels(run: Run, share: str) -> Iterator[plots.Panel]:
    steps = run.metrics.steps
    middle = len(steps) // 2
    parts = {"first steps": steps[:ENDS], "last steps": steps[-ENDS:]}
    if middle < ENDS:  # the two would overlap
        parts = {"first half": steps[:middle], "last half": steps[middle:]}
    for title, part in parts.items():
        columns: dict[str, list[float]] = {}
        for group, name in GROUP_NAMES.items():
            per_step = [record.get(f"{share}_{group}") for record in part]
            lists = [shares for shares in per_step if isinstance(shares, list)]
            means = [plots.finite_mean(layer) for layer in zip(*lists, strict=False)]
            columns |= {name: means} if any(map(math.isfinite, means)) else {}
        if columns:
            rows = [f"layer {layer}" for layer in range(min(map(len, columns.values())))]
            yield plots.Panel(f"{run.name}, {title}", columns, rows)


def _heat_map_figure(panels: Sequence[plots.Panel], caption: str, title: str) -> page.Figure:
    widest_first = sorted(panels, key=lambda panel: -len(panel.columns))
    names = list(dict.fromkeys(name for panel in widest_first for name in panel.columns))
    rows: list[Row | Sequence[str]] = []
    for panel in panels:
        rows.append(Row([panel.title], "group"))
        for row, layer in enumerate(panel.rows):
            values = [panel.columns[name][row] if name in panel.columns else math.nan for name in names]
            rows.append([layer, *(_number(value, "{:.0%}") for value in values)])
    maps = [plots.heat_maps(f"{panel.title}: {title}", [panel]) for panel in panels]
    return page.Figure(maps, caption, Table([title, *names], rows))


def _cost_table(runs: Sequence[Run]) -> Table:
    rows = [
        [
            run.name, f"{run.last.get('consumed_tokens', 0):,}", _duration(run.training_time_s),
            _number(run.tokens_per_s, "{:,.0f}"), _number(run.peak_memory_gib, "{:.2f} GiB"),
            str(run.num_ranks or run.settings.get("world_size") or "not recorded"),
        ]
        for run in runs
    ]  # fmt: skip
    note = (
        "Training time: the sum of all recorded steps, each counted once, including saving but not validation. Tokens "
        "per second: the median of the steps. Memory: the peak of the rank that used the most."
    )
    return Table(["run", "tokens", "training time", "tokens/s", "memory per rank", "ranks"], rows, note)


def _settings(report: Report) -> Iterator[Block]:
    facts = {title: {name: str(value) for name, value in values.items()} for title, values in report.facts.items()}
    for run in report.runs:
        values = {name: run.settings.get(name) for name in _SETTINGS}
        values["versions"] = [f"{name} {version}" for name, version in run.versions.items()]
        facts[run.name] = {
            name.replace("_", "-"): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in values.items()
            if value is not None and value != []
        }
    yield page.Facts(facts)
    for run in report.runs:
        if run.settings:
            text = "\n".join(f"{name}: {value}" for name, value in run.settings.items() if value is not None)
            yield page.Code(text, f"Every setting of {run.name} with its final value", folded=True)


def _commands(runs: Sequence[Run]) -> Iterator[Block]:
    for run in runs:
        if run.arguments:
            ranks = f"--nproc-per-node {run.num_ranks} " if (run.num_ranks or 1) > 1 else ""
            command = f"python -m moelpr.torchrun --standalone {ranks}-m moelpr.pretrain {shlex.join(run.arguments)}"
            lines = f".venv/bin/{command}".replace(" --", " \\\n    --")
            yield page.Code(lines, f"{run.name}, from the repository's folder, with another --save:")
    if missing := ", ".join(run.name for run in runs if not run.arguments):
        yield Text(f"No command line was recorded for {missing}; recipe.yaml has every setting.", "note")


def _numbers(report: Report, title: str, judgments: Sequence[Judgment], held_out: LanguageResults) -> dict[str, Any]:
    """The content of report.json."""
    evaluation = report.evaluation
    shares = {
        model: {name: {"overall": plots.finite_mean(values), "per_layer": values} for name, values in by_name.items()}
        for model, by_name in evaluation.routing["original_first_share"].items()
    }
    return {
        "title": title,
        "languages": evaluation.groups,
        "bits_per_byte": _by_model(evaluation, evaluation.value),
        "change": _by_model(evaluation, evaluation.change),
        "routing": {"layers": evaluation.layers, "original_expert_share": shares}
        | {"all_original_share": evaluation.routing["all_original_share"]},
        "claims": [asdict(judgment) for judgment in judgments],
        "checks": report.checks,
        "held_out": _by_model(held_out, held_out.value),
        "runs": {run.name: _run_numbers(run) for run in report.runs},
        "facts": report.facts,
        "continuations": evaluation.continuations,
    }


def _run_numbers(run: Run) -> dict[str, Any]:
    names = ("stage", "state", "step", "num_steps", "training_time_s", "tokens_per_s", "peak_memory_gib", "num_ranks")
    return {
        "folder": str(run.folder),
        "tokens": run.last.get("consumed_tokens"),
        "lm_loss": run.last.get("lm_loss"),
        **{name: getattr(run, name) for name in (*names, "settings", "versions", "arguments")},
        "warnings": run.metrics.warnings,
    }


def _by_model(
    results: LanguageResults, number: Callable[..., plots.Interval]
) -> dict[str, dict[str, dict[str, float]]]:
    return {model: {row: number(model, row)._asdict() for row in rows} for model, rows in results.bits.items()}


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number > 1 else ''}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else form.format(value)
