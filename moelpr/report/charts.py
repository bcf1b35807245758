"""The report's pictures, as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moelpr.evaluate.languages import language_name
from moelpr.report.report import MODELS, STAGES, Report, percent
from moelpr.report.svg import INK, MUTED, RULE, Drawing, sequential_colour, text_width, tick_label, ticks

MODEL_NAMES = {
    "base": "base",
    "full_finetune": "full fine-tuning",
    "stage1": "after stage 1",
    "stage2": "after stage 2",
}
RUN_NAMES = {"base": "Base", "full_finetune": "Full fine-tuning", "stage1": "Stage 1", "stage2": "Stage 2"}
# Told apart by lightness too: the report must work on a black-and-white printer.
MODEL_COLOURS = {"base": "#5f6c7b", "full_finetune": "#e39a3b", "stage1": "#9cc3e6", "stage2": "#1d4f91"}

MAX_POINTS = 400  # of a curve: a long run's report stays small


def headline_picture(report: Report) -> str:
    """Change in bits per byte against base, per language, for the three trained models: the effect in one picture."""
    bars = _ChangeBars(report)
    sentence = "; ".join(
        f"{language_name(language)}: "
        + ", ".join(f"{MODEL_NAMES[model]} {percent(bars.change(model, language))}" for model in bars.models)
        for group in bars.groups
        for language in report.group(group)
    )
    drawing = Drawing(bars.width, bars.height, "Change in bits per byte against the base model", sentence)
    bars.draw_legend(drawing)
    bars.draw_axis(drawing)
    y = bars.top
    for group in bars.groups:
        drawing.text(0, y + bars.group_gap - 12, f"{group.capitalize()} languages", size=12.5, bold=True)
        y += bars.group_gap
        for language in report.group(group):
            bars.draw_language(drawing, language, y)
            y += bars.row_height
    drawing.line(bars.x(0), bars.top - 6, bars.x(0), bars.height - bars.bottom, INK, 1.2)
    return drawing.render()


class _ChangeBars:
    """Where things stand in the headline picture: groups of languages from top to bottom, a bar for each model."""

    bar, bar_gap, row_gap, group_gap, top, bottom = 12, 2, 14, 34, 60.0, 24
    left, right, width = 104, 4, 900
    label_room = 52  # a bar's number stands at its end

    def __init__(self, report: Report):
        self.report = report
        self.models = [model for model in MODELS[1:] if model in report.bits_per_byte]
        self.groups = [group for group in ("expanded", "original") if report.group(group)]
        changes = [self.change(model, language) for model in self.models for language in report.languages]
        known = [change for change in changes if math.isfinite(change)]
        self.low, self.high = min([*known, -0.05]), max([*known, 0.05])
        self.row_height = len(self.models) * (self.bar + self.bar_gap) + self.row_gap
        num_rows = sum(len(report.group(group)) for group in self.groups)
        self.height = self.top + num_rows * self.row_height + len(self.groups) * self.group_gap + self.bottom

    def change(self, model: str, language: str) -> float:
        """Relative to base, NaN where either was not measured."""
        return self.report.bits(model, language) / self.report.bits("base", language) - 1

    def x(self, change: float) -> float:
        scale = (self.width - self.left - self.right - 2 * self.label_room) / (self.high - self.low)
        return self.left + self.label_room + (change - self.low) * scale

    def draw_legend(self, drawing: Drawing) -> None:
        x = float(self.left)
        for model in self.models:
            drawing.rect(x, 12, 14, 12, MODEL_COLOURS[model])
            drawing.text(x + 20, 22, MODEL_NAMES[model], size=12.5)
            x += 20 + text_width(MODEL_NAMES[model], 12.5) + 24
        drawing.text(self.x(0) - 8, 48, "\u2190 predicts better than base", size=11.5, fill=MUTED, anchor="end")
        drawing.text(self.x(0) + 8, 48, "predicts worse \u2192", size=11.5, fill=MUTED)

    def draw_axis(self, drawing: Drawing) -> None:
        end = self.height - self.bottom
        for tick in ticks(self.low, self.high, 6):
            drawing.line(self.x(tick), self.top - 6, self.x(tick), end, RULE)
            label = percent(tick).replace(".0%", "%") if round(tick, 9) else "base"
            drawing.text(self.x(tick), end + 16, label, size=10.5, fill=MUTED, anchor="middle")

    def draw_language(self, drawing: Drawing, language: str, y: float) -> None:
        middle = y + (self.row_height - self.row_gap) / 2 + 4
        drawing.text(self.left - 12, middle, language_name(language), size=13, anchor="end")
        for model in self.models:
            self._draw_bar(drawing, model, language, y)
            y += self.bar + self.bar_gap

    def _draw_bar(self, drawing: Drawing, model: str, language: str, y: float) -> None:
        change = self.change(model, language)
        label, is_known = percent(change), math.isfinite(change)
        tip_x = self.x(change) if is_known else self.x(0)
        if is_known:
            tip = f"{language_name(language)}, {MODEL_NAMES[model]}: {label}"
            start, end = sorted((self.x(0), tip_x))
            drawing.rect(start, y, max(end - start, 0.8), self.bar, MODEL_COLOURS[model], tip=tip)
        gap, anchor = (-5, "end") if change < 0 else (5, "start")
        drawing.text(tip_x + gap, y + self.bar - 2, label, size=11, anchor=anchor, bold=model == "stage2")


def heat_maps(report: Report) -> str:
    """Share of first choices that are the original expert, by layer and language, after each stage side by side."""
    stages = [stage for stage in STAGES if report.original_expert_share.get(stage)]
    languages = [*report.group("original"), *report.group("expanded")]
    shares = report.original_expert_share
    layers = max((len(share["per_layer"]) for stage in stages for share in shares[stage].values()), default=0)
    if not layers:
        return ""
    cell_width, cell_height = 58, 30 if layers <= 12 else 20
    left, top, gap, group_gap = 62, 62, 34, 8
    first_expanded = len(report.group("original"))
    panel = len(languages) * cell_width + group_gap
    width = left + len(stages) * panel + (len(stages) - 1) * gap + 4
    height = top + (layers + 1) * cell_height + 10 + 44
    drawing = Drawing(
        width,
        height,
        "Share of tokens whose first choice is the original expert, by layer and language",
        "; ".join(
            f"{MODEL_NAMES[stage]}: "
            + ", ".join(f"{language_name(name)} {share['overall']:.0%}" for name, share in shares[stage].items())
            for stage in stages
        ),
    )
    numbers = next(iter(shares[stages[0]].values())).get("layers", range(layers))
    for row in range(layers + 1):
        label = f"layer {numbers[row]}" if row < layers else "all"
        y = top + row * cell_height + (10 if row == layers else 0)
        drawing.text(left - 8, y + cell_height / 2 + 4, label, size=11.5, anchor="end", bold=row == layers)
    for position, stage in enumerate(stages):
        panel_x = left + position * (panel + gap)
        drawing.text(panel_x, 16, MODEL_NAMES[stage].capitalize(), size=14, bold=True)
        for column, language in enumerate(languages):
            x = panel_x + column * cell_width + (group_gap if column >= first_expanded else 0)
            if column in (0, first_expanded):
                drawing.text(x, 36, report.languages[language], size=11.5, fill=MUTED)
            drawing.text(x + cell_width / 2, top - 8, language_name(language)[:9], size=11.5, anchor="middle")
            share = shares[stage].get(language)
            values = [*share["per_layer"], share["overall"]] if share else []
            for row, value in enumerate(values):
                y = top + row * cell_height + (10 if row == layers else 0)
                fill, ink = sequential_colour(value)
                where = f"layer {numbers[row]}" if row < layers else "all layers"
                tip = f"{language_name(language)}, {where}, {MODEL_NAMES[stage]}: {value:.1%}"
                drawing.rect(x, y, cell_width, cell_height, fill, tip=tip, stroke="#ffffff")
                drawing.text(
                    x + cell_width / 2, y + cell_height / 2 + 4, f"{100 * value:.0f}%", size=11.5, fill=ink,
                    anchor="middle", bold=row == layers,
                )  # fmt: skip
    steps, bar_width = 40, 240.0
    y = height - 26
    for step in range(steps):
        drawing.rect(
            left + step * bar_width / steps, y, bar_width / steps + 0.3, 10, sequential_colour(step / (steps - 1))[0]
        )
    for value, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        drawing.text(left + value * bar_width, y + 23, f"{value:.0%}", size=10.5, fill=MUTED, anchor=anchor)
    drawing.text(left + bar_width + 12, y + 9, "of tokens go to the original expert first", size=11.5, fill=MUTED)
    return drawing.render()


@dataclass(frozen=True)
class Curve:
    """One line of a chart; all its numbers are finite."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dash: str | None = None


def line_chart(title: str, curves: Sequence[Curve], *, as_percent: bool = False, width: float = 452) -> str:
    """Curves over training steps: each point faintly, and a running mean; '' where there is nothing to draw."""
    drawn = [(curve, *_thin(curve.x, curve.y)) for curve in curves]
    drawn = [(curve, x, y) for curve, x, y in drawn if len(y) >= 2]
    if not drawn:
        return ""
    smooth = [_running_mean(y) for _, _, y in drawn]
    height, left, right, top, bottom = 216.0, 46.0, 10.0, 46.0, 34.0
    x_low, x_high = min(x[0] for _, x, _ in drawn), max(x[-1] for _, x, _ in drawn)
    y_low, y_high = min(min(values) for values in smooth), max(max(values) for values in smooth)
    y_low, y_high = (y_low, y_high) if y_high > y_low else (y_low - 0.5, y_high + 0.5)
    margin = 0.06 * (y_high - y_low)
    y_low, y_high = y_low - margin, y_high + margin
    if as_percent:
        y_low, y_high = 0.0, 1.0
    inner_width, inner_height = width - left - right, height - top - bottom

    def place(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
        span = (x_high - x_low) or 1
        return [
            ((a - x_low) / span * inner_width, (y_high - b) / (y_high - y_low) * inner_height)
            for a, b in zip(x, y, strict=True)
        ]

    ends = ", ".join(
        f"{curve.name or 'value'} from {values[0]:.3g} to {values[-1]:.3g}"
        for (curve, _, _), values in zip(drawn, smooth, strict=True)
    )
    drawing = Drawing(width, height, title, ends)
    drawing.text(0, 15, title, size=13, bold=True)
    legend_x = left
    for curve, _, _ in drawn:
        if not curve.name:
            continue
        drawing.path([(legend_x, 31), (legend_x + 20, 31)], curve.colour, width=2.4, dash=curve.dash)
        drawing.text(legend_x + 26, 35, curve.name, size=11.5, fill=MUTED)
        legend_x += 26 + text_width(curve.name, 11.5) + 16
    for tick in ticks(y_low, y_high, 5):
        tick_y = top + (y_high - tick) / (y_high - y_low) * inner_height
        drawing.line(left, tick_y, width - right, tick_y)
        label = f"{tick:.0%}" if as_percent else tick_label(tick)
        drawing.text(left - 7, tick_y + 4, label, size=10.5, fill=MUTED, anchor="end")
    for tick in ticks(x_low, x_high, 5):
        tick_x = left + (tick - x_low) / ((x_high - x_low) or 1) * inner_width
        drawing.line(tick_x, top + inner_height, tick_x, top + inner_height + 4, MUTED)
        drawing.text(tick_x, top + inner_height + 17, tick_label(tick), size=10.5, fill=MUTED, anchor="middle")
    drawing.text(width - right, height - 3, "training step", size=10.5, fill=MUTED, anchor="end")
    inside = Drawing(inner_width, inner_height)
    for curve, x, y in drawn:
        inside.path(place(x, y), curve.colour, width=1, opacity=0.28)
    for (curve, x, _), values in zip(drawn, smooth, strict=True):
        inside.path(place(x, values), curve.colour, width=2.2, dash=curve.dash)
    drawing.place(inside, left, top)
    drawing.line(left, top + inner_height, width - right, top + inner_height, MUTED)
    return drawing.render()


def training_charts(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Loss curves of each run (model -> records of metrics.jsonl) and what its routers did; only what was logged."""
    charts = []
    for model, name in RUN_NAMES.items():
        records = metrics.get(model, [])
        loss, original_loss, expanded_loss, balance, lpr, original_share, expanded_share = (
            _column(records, key)
            for key in (
                "lm_loss", "lm_loss_original", "lm_loss_expanded", "balance_loss", "lpr_loss",
                "original_first_share_original", "original_first_share_expanded",
            )
        )  # fmt: skip
        both = original_loss.y and expanded_loss.y
        charts.append(
            line_chart(
                f"{name}: next-token loss (nats per token)", _by_group(original_loss, expanded_loss) if both else [loss]
            )
        )
        if model == "stage1":
            charts.append(line_chart("Stage 1: balance loss", [balance]))
        if model == "stage2":
            charts.append(line_chart("Stage 2: LPR loss", [lpr]))
            charts.append(
                line_chart(
                    "Stage 2: first choices that are the original expert",
                    _by_group(original_share, expanded_share),
                    as_percent=True,
                )
            )
    return [chart for chart in charts if chart]


def _by_group(original: Curve, expanded: Curve) -> list[Curve]:
    return [
        replace(original, name="original languages", colour=MODEL_COLOURS["stage2"]),
        replace(expanded, name="expanded languages", colour=MODEL_COLOURS["full_finetune"], dash="5 3"),
    ]


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """The steps at which `key` was logged as a finite number, or as one number per layer, whose mean is drawn."""
    points = [(record["iteration"], _number(record.get(key))) for record in records]
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    return Curve("", MODEL_COLOURS["stage2"], [x for x, _ in known], [y for _, y in known])


def _number(value: Any) -> float | None:
    """A number as it is; of a number per layer the mean."""
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, int | float)]
        return sum(numbers) / len(numbers) if numbers else None
    return value if isinstance(value, int | float) else None


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, so that at most MAX_POINTS are left."""
    size = math.ceil(len(x) / MAX_POINTS) if x else 1

    def means(values: Sequence[float]) -> list[float]:
        return [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]

    return means(x), means(y)


def _running_mean(values: list[float]) -> list[float]:
    """Mean over about a twentieth of the curve around each point, over what there is of it at the ends."""
    reach = len(values) // 40
    neighbours = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(part) / len(part) for part in neighbours]
