"""The demo's pictures, as SVG."""

import math

from moelpr.languages import language_name
from moelpr.report.demo import MODELS, Report, percent
from moelpr.report.svg import INK, MUTED, PAGE, RULE, Drawing, text_width, ticks

MODEL_NAMES = {
    "base": "base",
    "full_finetune": "full fine-tuning",
    "stage1": "after stage 1",
    "stage2": "after stage 2",
}
# Fill and edge of a model's bars. Told apart in black and white: an empty bar, a light one and a dark one.
MODEL_BARS = {
    "full_finetune": (PAGE, "var(--series-1,#b35900)"),
    "stage1": ("var(--light-blue,#9cc3e6)", "var(--light-blue,#9cc3e6)"),
    "stage2": ("var(--series-0,#1d4f91)", "var(--series-0,#1d4f91)"),
}


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
        drawing.text(0, y + bars.group_gap - 12, f"{group.capitalize()} languages", size=14, bold=True)
        y += bars.group_gap
        for language in report.group(group):
            bars.draw_language(drawing, language, y)
            y += bars.row_height
    drawing.line(bars.x(0), bars.top - 6, bars.x(0), bars.height - bars.bottom, INK, 1.2)
    return drawing.render()


class _ChangeBars:
    """Where things stand in the headline picture: groups of languages from top to bottom, a bar for each model."""

    bar, bar_gap, row_gap, group_gap, top, bottom = 15, 3, 16, 40, 66.0, 26
    left, right, width = 96, 4, 560
    label_room = 58  # a bar's number stands at its end

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
            _draw_bar(drawing, x, 12, 14, 12, model)
            drawing.text(x + 20, 22, MODEL_NAMES[model], size=14)
            x += 20 + text_width(MODEL_NAMES[model], 14) + 24
        drawing.text(self.x(0) - 8, 52, "\u2190 predicts better than base", size=13, fill=MUTED, anchor="end")
        drawing.text(self.x(0) + 8, 52, "predicts worse \u2192", size=13, fill=MUTED)

    def draw_axis(self, drawing: Drawing) -> None:
        end = self.height - self.bottom
        for tick in ticks(self.low, self.high, 6):
            drawing.line(self.x(tick), self.top - 6, self.x(tick), end, RULE)
            label = percent(tick).replace(".0%", "%") if round(tick, 9) else "base"
            drawing.text(self.x(tick), end + 18, label, size=12, fill=MUTED, anchor="middle")

    def draw_language(self, drawing: Drawing, language: str, y: float) -> None:
        middle = y + (self.row_height - self.row_gap) / 2 + 4
        drawing.text(self.left - 12, middle, language_name(language), size=14.5, anchor="end")
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
            _draw_bar(drawing, start, y, max(end - start, 0.8), self.bar, model, tip)
        gap, anchor = (-5, "end") if change < 0 else (5, "start")
        drawing.text(tip_x + gap, y + self.bar - 3, label, size=13, anchor=anchor, bold=model == "stage2")


def _draw_bar(drawing: Drawing, x: float, y: float, width: float, height: float, model: str, tip: str = "") -> None:
    """The edge lies inside."""
    fill, edge = MODEL_BARS[model]
    line = min(1.6, width)
    drawing.rect(x + line / 2, y + line / 2, width - line, height - line, fill, tip=tip, stroke=edge, stroke_width=line)
