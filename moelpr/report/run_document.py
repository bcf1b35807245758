"""What a report says of one run or several: what was learned and forgotten, curves, routing, cost, how to repeat it."""

import math
import shlex
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from moelpr.languages import language_name
from moelpr.report.curves import Curve, column, line_chart, thinning_note
from moelpr.report.document import (
    Block,
    Code,
    Curves,
    Document,
    Facts,
    Picture,
    Row,
    Section,
    Table,
    Text,
    Verdict,
)
from moelpr.report.evaluation import Evaluation
from moelpr.report.language_table import held_out_results, language_table, summary
from moelpr.report.routing_picture import Panel, layer_names, routing_pictures, routing_table
from moelpr.report.runs import ENDS, Run
from moelpr.run_metrics import Record

MAX_WARNINGS = 30
GROUPS = {"original": "original languages", "expanded": "expanded languages"}

# Settings that say how a run was made; the whole list stands in its recipe.yaml.
_SETTINGS = {
    "micro_batch_size": "sequences per micro-batch",
    "global_batch_size": "sequences per step",
    "seq_length": "tokens per sequence",
    "lr": "learning rate",
    "lr_decay_style": "learning-rate schedule",
    "balance_loss_coeff": "balance loss, α",
    "lpr_loss_coeff": "LPR loss, γ",
    "num_original_experts": "original experts",
    "num_experts": "new experts",
    "moe_router_topk": "experts per token",
    "data_path": "data",
    "validation_data": "held-out data",
    "tensor_model_parallel_size": "tensor parallel",
    "pipeline_model_parallel_size": "pipeline parallel",
    "expert_model_parallel_size": "expert parallel",
    "world_size": "ranks",
    "seed": "seed",
}


def run_document(runs: Sequence[Run], evaluation: Evaluation) -> Document:
    """runs: in the order they were made, such as stage 1 and stage 2."""
    results = held_out_results(runs)
    sections = [
        Section("", [Text(summary(runs, evaluation, results), "summary"), _state_table(runs), *_warnings(runs)]),
        Section("Learned and forgotten, per language", language_table(evaluation, results)),
        Section("Curves", _curves(runs)),
        Section("Who answers: the original experts or new ones", _routing(runs, evaluation)),
        Section("Cost", [_cost_table(runs)]),
        Section("How it was made", [Facts({run.name: _facts(run) for run in runs}), *_recipes(runs)]),
        Section("How to do it again", _commands(runs)),
    ]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    kicker = f"Training report of {', '.join(str(run.folder) for run in runs)}, written {written}"
    return Document(_title(runs), kicker, sections)


def _title(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        of = f" of {run.num_steps:,}" if run.num_steps else ""
        state = "finished" if run.state == "finished" else f"{run.state} at"
        parts.append(f"{run.name} {state}{'' if run.state == 'finished' else f' step {run.step:,}{of}'}")
    return ", ".join(parts)


def _state_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        of = f" of {run.num_steps:,}" if run.num_steps else ""
        left = (run.num_steps or 0) - run.step
        time_left = ""
        if run.state == "running" and left > 0 and run.step_time_s:
            time_left = f", {duration(left * run.step_time_s)} left"
        rows.append(
            Row(
                [
                    run.name, run.stage, f"{run.state}{time_left}", f"{run.step:,}{of}",
                    _number(run.last.get("lm_loss"), "{:.3f}"), str(len(run.metrics.warnings)),
                ]
            )
        )  # fmt: skip
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
        return [Text("No curves yet: a run needs two steps for one.", "note")]
    return [Curves(charts, _curves_table(runs), thinning_note(drawn))]


def _charts_of(run: Run) -> list[tuple[str, list[Curve], bool, bool]]:
    """Title, curves, whether they are shares, whether to draw a running mean. What was not logged is not drawn."""
    steps = run.metrics.steps
    losses = [column(steps, f"lm_loss_{group}", name) for group, name in GROUPS.items()]
    if not all(curve.y for curve in losses):
        losses = [column(steps, "lm_loss")]
    shares = [column(steps, f"original_first_share_{group}", name) for group, name in GROUPS.items()]
    return [
        *_validation_charts(run.metrics.validations),
        ("next-token loss (nats per token)", losses, False, True),
        ("balance loss", [column(steps, "balance_loss")], False, True),
        ("LPR loss (nats)", [column(steps, "lpr_loss")], False, True),
        ("first choices that are an original expert", [share for share in shares if share.y], True, True),
        ("gradient norm", [column(steps, "grad_norm")], False, True),
        ("learning rate", [column(steps, "learning_rate")], False, False),
        ("tokens per second", [column(steps[1:], "tokens_per_s")], False, True),
    ]


def _validation_charts(validations: Sequence[Record]) -> list[tuple[str, list[Curve], bool, bool]]:
    """Held-out text, languages of a group in one chart, a chart for each unit."""
    charts = []
    for unit, title in (("bits_per_byte", "bits per byte"), ("bits_per_token", "bits per token")):
        for group, name in GROUPS.items():
            languages = dict.fromkeys(
                language
                for record in validations
                for language, result in record["languages"].items()
                if result.get("group") == group and result.get(unit) is not None
            )
            curves = [
                column(
                    [
                        {"iteration": record["iteration"], "value": record["languages"].get(language, {}).get(unit)}
                        for record in validations
                    ],
                    "value",
                    language_name(language),
                )
                for language in languages
            ]
            charts.append((f"held-out text, {name} ({title})", curves, False, False))
    return charts


def _curves_table(runs: Sequence[Run], num_rows: int = 8) -> Table:
    """The curves in a few numbers, means over a part of the run each."""
    names = {"lm_loss": "loss", "balance_loss": "balance", "lpr_loss": "LPR", "tokens_per_s": "tokens/s"}
    rows = []
    for run in runs:
        steps = run.metrics.steps
        size = max(1, math.ceil(len(steps) / num_rows))
        for start in range(0, len(steps), size):
            part = steps[start : start + size]
            first, last = part[0]["iteration"], part[-1]["iteration"]
            means = [_number(_mean(column(part, name).y), "{:.4g}") for name in names]
            rows.append(Row([f"{run.name}, steps {first:,} to {last:,}", *means]))
    return Table(["mean over", *names.values()], rows)


def _routing(runs: Sequence[Run], evaluation: Evaluation) -> list[Block]:
    """Before and after review, on the text that was trained on; of the evaluation's models per language."""
    blocks: list[Block] = []
    panels = [panel for run in runs for panel in _panels(run)]
    if panels:
        caption = (
            "Share of training tokens whose first choice is an original expert, per MoE layer and language group, over "
            f"the first and the last {ENDS} steps at most. Review (stage 2) sends original-language text there."
        )
        blocks.append(Picture(routing_pictures(panels), caption, routing_table(panels)))
    if evaluation.original_first_shares:
        panels = [
            Panel(
                model,
                {language_name(language): shares[language] for language in evaluation.languages if language in shares},
                layer_names(evaluation.layers),
            )
            for model, shares in evaluation.original_first_shares.items()
        ]
        caption = "The same on held-out text, per language, as python -m moelpr.evaluate counted it."
        blocks.append(Picture(routing_pictures(panels), caption, routing_table(panels)))
    return blocks


def _panels(run: Run) -> list[Panel]:
    steps = run.metrics.steps
    parts = {f"{run.name}, first steps": steps[:ENDS], f"{run.name}, last steps": steps[-ENDS:]}
    if len(steps) < 2 * ENDS:  # the two would overlap
        parts = {
            f"{run.name}, first half": steps[: len(steps) // 2],
            f"{run.name}, last half": steps[len(steps) // 2 :],
        }
    panels = []
    for title, part in parts.items():
        columns = {
            name: _mean_per_layer([record.get(f"original_first_share_{group}") for record in part])
            for group, name in GROUPS.items()
        }
        columns = {name: values for name, values in columns.items() if values}
        if columns:
            panels.append(Panel(title, columns, layer_names(range(len(next(iter(columns.values())))))))
    return panels


def _mean_per_layer(values: Sequence[Any]) -> list[float]:
    """Of lists with a number per layer; [] where there is none."""
    lists = [value for value in values if isinstance(value, list) and value]
    if not lists:
        return []
    means = []
    for layer in range(len(lists[0])):
        known = [value[layer] for value in lists if layer < len(value) and value[layer] is not None]
        means.append(_mean(known) if known else math.nan)
    return means if any(math.isfinite(value) for value in means) else []


def _cost_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        ranks = run.num_ranks or run.settings.get("world_size")
        rows.append(
            Row(
                [
                    run.name, f"{run.last.get('consumed_tokens', 0):,}", duration(run.training_time_s),
                    _number(run.tokens_per_s, "{:,.0f}"), _number(run.peak_memory_gib, "{:.2f} GiB"),
                    str(ranks or "not recorded"),
                ]
            )
        )  # fmt: skip
    note = (
        "Time: of the training steps on record, each counted once, with saving between them; validation passes are "
        "left out. Tokens per second: median of the steps. Memory: the most that the fullest rank held."
    )
    return Table(["run", "tokens", "training time", "tokens/s", "memory per rank", "ranks"], rows, note)


def _facts(run: Run) -> dict[str, str]:
    facts = {}
    for name, title in _SETTINGS.items():
        value = run.settings.get(name)
        if value is not None and value != []:
            facts[title] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return facts | ({"versions": versions} if versions else {})


def _recipes(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        if run.settings:
            lines = [f"{name}: {value}" for name, value in run.settings.items() if value is not None]
            blocks.append(Code("\n".join(lines), f"Every setting of {run.name} with its final value", folded=True))
    return blocks


def _commands(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        if run.arguments:
            ranks = f"--nproc-per-node {run.num_ranks} " if (run.num_ranks or 1) > 1 else ""
            command = (
                f".venv/bin/python -m moelpr.torchrun --standalone {ranks}-m moelpr.pretrain "
                f"{shlex.join(run.arguments)}"
            )
            blocks.append(Code(_wrapped(command), f"{run.name}, from the repository's folder, with another --save:"))
    missing = [run.name for run in runs if not run.arguments]
    if missing:
        blocks.append(
            Text(f"No command line is on record for {', '.join(missing)}; recipe.yaml has every setting.", "note")
        )
    return blocks


def _wrapped(command: str) -> str:
    """A new line before every flag."""
    return command.replace(" --", " \\\n    --")


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else form.format(value)
