"""Figures of runs: curves over steps, and heat maps of routing, each with a table of its numbers."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from moelpr.base.languages import language_name
from moelpr.measure.report import page, plots
from moelpr.measure.report.language_results import LanguageResults
from moelpr.measure.report.numbers import finite_mean, number_text
from moelpr.measure.report.page import Block, Row, Table, Text
from moelpr.measure.report.runs import ENDS, Run, curve_of
from moelpr.model.metrics.schema import GROUP_NAMES, METRICS, ROUTING_SHARES, TOKENS_PER_S


def curve_figures(runs: Sequence[Run]) -> list[Block]:
    """A chart of everything that was logged, in a grid."""
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
    """Yield a chart's title, its curves, whether they are fractions, and whether to smooth them."""
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
    for title, (*metrics,) in groupby((m for m in METRICS if m.in_chart), key=lambda m: m.heading):
        first = 1 if TOKENS_PER_S in metrics else 0  # the first step includes the start of the program
        by_metric = {m: curve_of(run.metrics.steps[first:], m, GROUP_NAMES.get(m.group, "")) for m in metrics}
        by_group = [curve for m, curve in by_metric.items() if m.group and any(curve.y)]
        whole = [curve for m, curve in by_metric.items() if not m.group]
        shown = whole if whole and len(whole) + len(by_group) < len(metrics) else by_group or whole
        yield title, shown, metrics[0].is_fraction, metrics[0].is_noisy


def _curves_table(runs: Sequence[Run]) -> Table:
    """The curves in a few numbers, each the mean over an eighth of the run."""
    columns = [metric for metric in METRICS if metric.label]
    rows = []
    for run in runs:
        steps = run.metrics.steps
        size = max(1, math.ceil(len(steps) / 8))
        for part in (steps[start : start + size] for start in range(0, len(steps), size)):
            means = [number_text(finite_mean(curve_of(part, metric).y), "{:.4g}") for metric in columns]
            rows.append([f"{run.name}, steps {part[0]['iteration']:,} to {part[-1]['iteration']:,}", *means])
    return Table(["mean over", *(metric.label for metric in columns)], rows)


def routing_figures(runs: Sequence[Run], evaluation: LanguageResults) -> list[Block]:
    """Draw the routing of evaluated models per language of the held-out text, and of runs on their training text."""
    figures: list[Block] = []
    for share, title in ROUTING_SHARES.items():
        evaluated = []
        for model, shares in evaluation.routing[share].items():
            if model not in evaluation.layers:
                continue
            languages = [name for name in evaluation.languages("original", "expanded", "") if name in shares]
            columns = {language_name(name): [*shares[name], finite_mean(shares[name])] for name in languages}
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
            means = [finite_mean(layer) for layer in zip(*lists, strict=False)]
            columns |= {name: means} if any(map(math.isfinite, means)) else {}
        if columns:
            length = min(map(len, columns.values()))
            numbers = run.moe_layers if len(run.moe_layers or ()) == length else None
            yield plots.Panel(f"{run.name}, {title}", columns, [f"layer {layer}" for layer in numbers or range(length)])


def _heat_map_figure(panels: Sequence[plots.Panel], caption: str, title: str) -> page.Figure:
    widest_first = sorted(panels, key=lambda panel: -len(panel.columns))
    names = list(dict.fromkeys(name for panel in widest_first for name in panel.columns))
    rows: list[Row | Sequence[str]] = []
    for panel in panels:
        rows.append(Row([panel.title], "group"))
        for row, layer in enumerate(panel.rows):
            values = [panel.columns[name][row] if name in panel.columns else math.nan for name in names]
            rows.append([layer, *(number_text(value, "{:.0%}") for value in values)])
    maps = [plots.heat_maps(f"{panel.title}: {title}", [panel]) for panel in panels]
    return page.Figure(maps, caption, Table([title, *names], rows))
