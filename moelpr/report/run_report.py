"""The report of runs: learned and forgotten, claims, routing, curves, cost, and how to repeat it."""

import json
import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from moelpr.files import atomic_file
from moelpr.languages import language_name
from moelpr.report.page import (
    Block,
    Cell,
    Code,
    Facts,
    Figure,
    Page,
    Row,
    Sample,
    Section,
    Table,
    Text,
    Verdict,
    write_page,
)
from moelpr.report.plots import (
    Curve,
    Interval,
    Panel,
    change_chart,
    finite_mean,
    heat_maps,
    line_chart,
    percent,
    thinning_note,
)
from moelpr.report.runs import ENDS, Claims, Judgment, Results, Run, check_result, curve_of, held_out_results
from moelpr.run_metrics import Record

MAX_WARNINGS = 30
GROUP_NAMES = {"original": "original languages", "expanded": "expanded languages"}
# Flags that say how a run was made; its recipe.yaml has all of them.
_SETTINGS = (
    "micro_batch_size", "global_batch_size", "seq_length", "lr", "lr_decay_style", "balance_loss_coeff",
    "lpr_loss_coeff", "num_original_experts", "num_experts", "moe_router_topk", "data_path", "validation_data",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "world_size", "seed",
)  # fmt: skip
Chart = tuple[str, list[Curve], bool, bool]  # title, curves, whether they are fractions, whether to smooth them


@dataclass(frozen=True)
class Report:
    """Everything a report is made from; see `moelpr.report.runs`.

    Attributes:
        runs: in the order in which they were made, such as stage 1 and stage 2.
        evaluation: results of `python -m moelpr.evaluate`.
        checks: name -> result of verify.py.
        facts: title -> name -> value, shown with the settings.
    """

    runs: Sequence[Run]
    evaluation: Results = field(default_factory=Results)
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: Claims = field(default_factory=Claims)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write report.html, report.md and report.json into `folder`; returns the path of the HTML file."""
        judgments = self.claims.judge(self.evaluation, self.checks)
        held_out = held_out_results(self.runs)
        page = _page(self, judgments, held_out)
        with atomic_file(folder / "report.json") as temporary:
            content = _finite_or_null(_numbers(self, page.title, judgments, held_out))
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        return write_page(folder, "report", page)


def _page(report: Report, judgments: Sequence[Judgment], held_out: Results) -> Page:
    runs, evaluation = report.runs, report.evaluation
    summary = Text(_summary(runs, evaluation, held_out), "summary")
    outcome = [*_verdict(judgments, report.claims.note), *_change_figure(evaluation)]
    sections = [
        Section("", [summary, *outcome, _state_table(runs), *_warnings(runs)]),
        Section("Learned and forgotten, per language", _language_tables(evaluation, held_out)),
        Section("Claims", _claims_table(report.claims, judgments)),
        Section("Checks", _checks_table(report)),
        Section("Routing: original or new experts", _routing(runs, evaluation)),
        Section("Curves", _curves(runs)),
        Section("Continuations", _continuations(evaluation)),
        Section("Cost", [_cost_table(runs)]),
        Section("Settings", [Facts(_facts(report)), *_recipes(runs)]),
        Section("How to repeat it", _commands(runs)),
    ]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    kicker = f"Training report of {', '.join(str(run.folder) for run in runs)}, written {written}"
    return Page(_title(runs, report.claims, judgments), kicker, sections)


# ----------------------------------------------------------------------------------------------- title and outcome


def _title(runs: Sequence[Run], claims: Claims, judgments: Sequence[Judgment]) -> str:
    """The claims' own title only if every claim is shown."""
    if judgments:
        shown = sum(judgment.ok for judgment in judgments)
        is_proven = shown == len(judgments) and claims.title
        return claims.title if is_proven else f"{shown} of {len(judgments)} claims are shown"
    parts = []
    for run in runs:
        of = f" of {run.num_steps:,}" if run.num_steps else ""
        parts.append(f"{run.name} " + ("finished" if run.is_finished else f"{run.state} at step {run.step:,}{of}"))
    return ", ".join(parts)


def _summary(runs: Sequence[Run], evaluation: Results, held_out: Results) -> str:
    """One sentence: the mean change of each language group from the first model to the last."""
    results, source = evaluation, "on held-out documents"
    if len(evaluation.models) < 2:
        results, source = held_out, "on the runs' held-out text"
    if len(results.models) < 2 or not results.has_start:
        return f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {sum(run.step for run in runs):,} recorded steps."
    first, last = results.models[0], results.models[-1]
    parts = []
    for group in ("expanded", "original"):
        changes = {name: results.change(last, name).value for name in results.languages(group)}
        known = [name for name, change in changes.items() if math.isfinite(change)]
        if known:
            mean = results.change(last, f"mean {group}").value
            mean = mean if math.isfinite(mean) else finite_mean(list(changes.values()))
            parts.append(f"{group} languages {percent(mean)} ({', '.join(map(language_name, known))})")
    unit = "token" if results.per_token else "byte"
    return f"Bits per {unit} {source}, {last} against {first}: {'; '.join(parts)}. Lower is better."


def _verdict(judgments: Sequence[Judgment], note: str) -> list[Block]:
    if not judgments:
        return []
    missed = [judgment for judgment in judgments if not judgment.ok]
    details = f": {len(judgments) - len(missed)} of {len(judgments)}{'; these are not' if missed else ''}."
    items = [f"{language_name(m.language) or m.name}: {m.found}; claim: {m.claim}" for m in missed]
    finding = "Not every claim is shown" if missed else "Every claim is shown"
    return [Verdict(finding, details, items), *([Text(note)] if note else [])]


def _change_figure(results: Results) -> list[Block]:
    if len(results.models) < 2:
        return []
    rows: dict[str, dict[str, Interval | None]] = {}
    for group, members in results.rows().items():
        rows |= {GROUP_NAMES[group].capitalize(): {}} if group else {}
        rows |= {language_name(row): {m: results.change(m, row) for m in results.models[1:]} for row in members}
    reference = results.models[0]
    chart = change_chart("Change in bits per byte on held-out text", rows, axis=f"bits per byte against {reference}")
    caption = (
        f"Change in bits per byte on held-out text against {reference}, with 95% intervals. A hollow bar is unclear: "
        "its interval contains 0."
    )
    return [Figure([chart], caption)]


def _state_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        of = f" of {run.num_steps:,}" if run.num_steps else ""
        left = (run.num_steps or 0) - run.step
        is_timed = run.state == "running" and left > 0 and run.step_time_s
        time_left = f", {_duration(left * (run.step_time_s or 0))} left" if is_timed else ""
        loss = _number(run.last.get("lm_loss"), "{:.3f}")
        rows.append(
            [run.name, run.stage, f"{run.state}{time_left}", f"{run.step:,}{of}", loss, str(len(run.metrics.warnings))]
        )
    return Table(["run", "stage", "state", "steps", "last loss", "warnings"], rows, text_columns=[1, 2])


def _warnings(runs: Sequence[Run]) -> list[Block]:
    found = [
        f"{run.name}, step {record['iteration']:,}: {record.get('message', '')}"
        for run in runs
        for record in run.metrics.warnings
    ]
    if not found:
        return []
    more = f" The first {MAX_WARNINGS} of {len(found)}." if len(found) > MAX_WARNINGS else ""
    return [
        Verdict(f"{len(found)} warning{'s' if len(found) > 1 else ''} during training.", more, found[:MAX_WARNINGS])
    ]


# ----------------------------------------------------------------------------------------- results per language


def _language_tables(evaluation: Results, held_out: Results) -> list[Block]:
    """Evaluated models with intervals, and the runs' own held-out text."""
    blocks: list[Block] = []
    if evaluation.bits:
        note = (
            f"Bits per byte on held-out documents, with the change against {evaluation.models[0]}; lower is better. In "
            "brackets 95% intervals, bootstrap over documents. A change whose interval contains 0 may be chance."
        )
        blocks.append(_results_table("evaluated", evaluation, note))
    if held_out.bits:
        since = f", with the change from {held_out.models[0]}" if held_out.has_start else ""
        note = (
            f"Bits per byte on the runs' --validation-data, packed into the windows of training{since}; lower is "
            "better. No intervals: one pass over one text. The evaluation scores each document separately, so "
            "its numbers differ."
        )
        blocks.append(_results_table("held out while training", held_out, note))
    return blocks or [
        Text(
            "There are no results per language: train with --validation-data LANG=PREFIX, or evaluate the exports "
            "(python -m moelpr.evaluate) and pass the results to this report with --evaluation FILE."
        )
    ]


def _results_table(title: str, results: Results, note: str) -> Table:
    rows = []
    for group, members in results.rows().items():
        rows += [Row([GROUP_NAMES[group].capitalize()], "group")] if group else []
        for row in members:
            unit = " (bits per token)" if row in results.per_token else ""
            cells = [_result(results, model, row) for model in results.models]
            is_mean = row.startswith("mean ")
            rows.append(Row(["mean" if is_mean else language_name(row) + unit, *cells], "mean" if is_mean else ""))
    return Table([title, *results.models], rows, note)


def _result(results: Results, model: str, row: str) -> Cell:
    value, change = results.value(model, row), results.change(model, row)
    if not math.isfinite(value.value):
        return Cell("–")
    text = _with_interval(value, "{:.3f}".format)
    if model == results.models[0] or not results.has_start or not math.isfinite(change.value):
        return Cell(text)
    return Cell(text, _with_interval(change, percent), change.value)


def _with_interval(estimate: Interval, write: Callable[[float], str]) -> str:
    text = write(estimate.value)
    return f"{text} [{write(estimate.low)}, {write(estimate.high)}]" if estimate.has_bounds else text


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


def _continuations(evaluation: Results) -> list[Block]:
    samples: list[Block] = []
    for language, sample in evaluation.continuations.items():
        texts = {**sample["by_model"], "the text itself": sample["reference"]}
        samples.append(Sample(language, language_name(language), sample["prompt"], texts))
    note = (
        "The first words of a held-out document, continued by each model. One sample per language illustrates the "
        "models; it does not measure them."
    )
    return [Text(note, "note"), *samples] if samples else []


# ---------------------------------------------------------------------------------------------- curves and routing


def _curves(runs: Sequence[Run]) -> list[Block]:
    charts, drawn = [], []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for title, curves, as_percent, smooth in _charts_of(run):
            chart = line_chart(prefix + title, curves, as_percent=as_percent, smooth=smooth)
            if chart:
                charts.append(chart)
                drawn += curves if smooth else []
    if not charts:
        return [Text("There are no curves yet: a curve needs two steps.", "note")]
    return [Figure(charts, thinning_note(drawn), _curves_table(runs), is_grid=True)]


def _charts_of(run: Run) -> list[Chart]:
    """Everything that was logged."""
    steps = run.metrics.steps
    losses = [curve_of(steps, f"lm_loss_{group}", name) for group, name in GROUP_NAMES.items()]
    if not all(curve.y for curve in losses):
        losses = [curve_of(steps, "lm_loss")]
    shares = [curve_of(steps, f"original_first_share_{group}", name) for group, name in GROUP_NAMES.items()]
    return [
        *_validation_charts(run.metrics.validations),
        ("next-token loss (nats per token)", losses, False, True),
        ("balance loss", [curve_of(steps, "balance_loss")], False, True),
        ("LPR loss (nats)", [curve_of(steps, "lpr_loss")], False, True),
        ("first choices that are an original expert", [share for share in shares if share.y], True, True),
        ("gradient norm", [curve_of(steps, "grad_norm")], False, True),
        ("learning rate", [curve_of(steps, "learning_rate")], False, False),
        ("tokens per second", [curve_of(steps[1:], "tokens_per_s")], False, True),
    ]


def _validation_charts(validations: Sequence[Record]) -> list[Chart]:
    """Held-out text: one chart per unit and group, one curve per language."""
    charts = []
    for unit, title in (("bits_per_byte", "bits per byte"), ("bits_per_token", "bits per token")):
        for group, name in GROUP_NAMES.items():
            values: dict[str, list[Record]] = {}
            for record in validations:
                for language, result in record["languages"].items():
                    if result.get("group") == group and result.get(unit) is not None:
                        point = {"iteration": record["iteration"], "value": result[unit]}
                        values.setdefault(language, []).append(point)
            curves = [curve_of(records, "value", language_name(language)) for language, records in values.items()]
            charts.append((f"held-out text, {name} ({title})", curves, False, False))
    return charts


def _curves_table(runs: Sequence[Run], num_rows: int = 8) -> Table:
    """The curves in a few numbers, each the mean over a part of the run."""
    names = {"lm_loss": "loss", "balance_loss": "balance", "lpr_loss": "LPR", "tokens_per_s": "tokens/s"}
    rows = []
    for run in runs:
        steps = run.metrics.steps
        size = max(1, math.ceil(len(steps) / num_rows))
        for start in range(0, len(steps), size):
            part = steps[start : start + size]
            first, last = part[0]["iteration"], part[-1]["iteration"]
            means = [_number(finite_mean(curve_of(part, name).y), "{:.4g}") for name in names]
            rows.append([f"{run.name}, steps {first:,} to {last:,}", *means])
    return Table(["mean over", *names.values()], rows)


def _routing(runs: Sequence[Run], evaluation: Results) -> list[Block]:
    """Before and after review, on the training text; of evaluated models, per language of the held-out text."""
    blocks: list[Block] = []
    evaluated = []
    for model, shares in evaluation.original_first_shares.items():
        columns = {
            language_name(name): [*shares[name], finite_mean(shares[name])]
            for name in evaluation.languages("original", "expanded", "")
            if name in shares
        }
        evaluated.append(Panel(model, columns, [*_layer_names(evaluation.layers[model]), "mean"]))
    if evaluated:
        caption = "Fraction of held-out tokens whose first choice is an original expert, per MoE layer and language."
        blocks.append(_heat_map_figure(evaluated, caption))
    panels = [panel for run in runs for panel in _run_panels(run)]
    if panels:
        caption = (
            "Fraction of training tokens whose first choice is an original expert, per MoE layer and language group, "
            f"over at most {ENDS} steps. Review (stage 2) teaches the routers to send original-language text there."
        )
        blocks.append(_heat_map_figure(panels, caption))
    return blocks


def _heat_map_figure(panels: Sequence[Panel], caption: str) -> Figure:
    widest_first = sorted(panels, key=lambda panel: -len(panel.columns))
    names = list(dict.fromkeys(name for panel in widest_first for name in panel.columns))
    rows: list[Row | Sequence[str]] = []
    for panel in panels:
        rows.append(Row([panel.title], "group"))
        for row, title in enumerate(panel.rows):
            values = [panel.columns[name][row] if name in panel.columns else math.nan for name in names]
            rows.append([title, *(_number(value, "{:.0%}") for value in values)])
    maps = [heat_maps(f"{panel.title}: original expert first", [panel]) for panel in panels]
    return Figure(maps, caption, Table(["first choice is an original expert", *names], rows))


def _layer_names(layers: Iterable[int]) -> list[str]:
    return [f"layer {layer}" for layer in layers]


def _run_panels(run: Run) -> list[Panel]:
    steps = run.metrics.steps
    parts = {f"{run.name}, first steps": steps[:ENDS], f"{run.name}, last steps": steps[-ENDS:]}
    if len(steps) < 2 * ENDS:  # the two would overlap
        middle = len(steps) // 2
        parts = {f"{run.name}, first half": steps[:middle], f"{run.name}, last half": steps[middle:]}
    panels = []
    for title, part in parts.items():
        columns = {
            name: _mean_per_layer([record.get(f"original_first_share_{group}") for record in part])
            for group, name in GROUP_NAMES.items()
        }
        columns = {name: values for name, values in columns.items() if values}
        if columns:
            panels.append(Panel(title, columns, _layer_names(range(len(next(iter(columns.values())))))))
    return panels


def _mean_per_layer(values: Sequence[Any]) -> list[float]:
    """Mean of lists with a number (or None) per layer; [] if there is no number."""
    lists = [value for value in values if isinstance(value, list) and value]
    means = [
        finite_mean([value[layer] for value in lists if layer < len(value) and value[layer] is not None])
        for layer in range(len(lists[0]) if lists else 0)
    ]
    return means if any(math.isfinite(value) for value in means) else []


# ------------------------------------------------------------------------------------------------ cost and settings


def _cost_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        ranks = run.num_ranks or run.settings.get("world_size")
        rows.append(
            [
                run.name, f"{run.last.get('consumed_tokens', 0):,}", _duration(run.training_time_s),
                _number(run.tokens_per_s, "{:,.0f}"), _number(run.peak_memory_gib, "{:.2f} GiB"),
                str(ranks or "not recorded"),
            ]
        )  # fmt: skip
    note = (
        "Training time: the sum of all recorded steps, each counted once, including saving but not validation. Tokens "
        "per second: the median of the steps. Memory: the peak of the rank that used the most."
    )
    return Table(["run", "tokens", "training time", "tokens/s", "memory per rank", "ranks"], rows, note)


def _facts(report: Report) -> dict[str, dict[str, str]]:
    facts = {title: {name: str(value) for name, value in values.items()} for title, values in report.facts.items()}
    for run in report.runs:
        values = {name: run.settings.get(name) for name in _SETTINGS}
        values["versions"] = [f"{name} {version}" for name, version in run.versions.items()]
        facts[run.name] = {
            name.replace("_", "-"): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in values.items()
            if value is not None and value != []
        }
    return facts


def _recipes(runs: Sequence[Run]) -> list[Block]:
    return [
        Code(
            "\n".join(f"{name}: {value}" for name, value in run.settings.items() if value is not None),
            f"Every setting of {run.name} with its final value",
            folded=True,
        )
        for run in runs
        if run.settings
    ]


def _commands(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        if run.arguments:
            ranks = f"--nproc-per-node {run.num_ranks} " if (run.num_ranks or 1) > 1 else ""
            command = f"python -m moelpr.torchrun --standalone {ranks}-m moelpr.pretrain {shlex.join(run.arguments)}"
            lines = f".venv/bin/{command}".replace(" --", " \\\n    --")
            blocks.append(Code(lines, f"{run.name}, from the repository's folder, with another --save:"))
    missing = [run.name for run in runs if not run.arguments]
    if missing:
        text = f"No command line was recorded for {', '.join(missing)}; recipe.yaml has every setting."
        blocks.append(Text(text, "note"))
    return blocks


# ------------------------------------------------------------------------------------------------------------ JSON


def _numbers(report: Report, title: str, judgments: Sequence[Judgment], held_out: Results) -> dict[str, Any]:
    """The content of report.json."""
    evaluation = report.evaluation
    return {
        "title": title,
        "languages": evaluation.groups,
        "bits_per_byte": _by_model(evaluation, evaluation.value),
        "change": _by_model(evaluation, evaluation.change),
        "routing": {
            "layers": evaluation.layers,
            "original_expert_share": {
                model: {name: {"overall": finite_mean(values), "per_layer": values} for name, values in shares.items()}
                for model, shares in evaluation.original_first_shares.items()
            },
        },
        "claims": [asdict(judgment) for judgment in judgments],
        "checks": report.checks,
        "held_out": _by_model(held_out, held_out.value),
        "runs": {run.name: _run_numbers(run) for run in report.runs},
        "facts": report.facts,
        "continuations": evaluation.continuations,
    }


def _run_numbers(run: Run) -> dict[str, Any]:
    names = ("stage", "state", "step", "num_steps", "training_time_s", "tokens_per_s", "peak_memory_gib", "num_ranks")
    numbers = {name: getattr(run, name) for name in (*names, "settings", "versions", "arguments")}
    return {
        "folder": str(run.folder),
        "tokens": run.last.get("consumed_tokens"),
        "lm_loss": run.last.get("lm_loss"),
        **numbers,
        "warnings": run.metrics.warnings,
    }


def _by_model(results: Results, number: Callable[[str, str], Interval]) -> dict[str, dict[str, dict[str, float]]]:
    return {model: {row: number(model, row)._asdict() for row in rows} for model, rows in results.bits.items()}


def _finite_or_null(value: Any) -> Any:
    """JSON has neither NaN nor Inf."""
    if isinstance(value, Mapping):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else form.format(value)
