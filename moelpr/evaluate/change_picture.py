"""One mark with its interval for every language and model: what was learned and what was forgotten."""

from collections.abc import Callable, Mapping

from moelpr.evaluate.bootstrap import Estimate
from moelpr.languages import language_name
from moelpr.report.svg import INK, MUTED, PAGE, RULE, Drawing, text_width, ticks

ROW, GAP, MARK = 18, 10, 8
LEFT_OF_ZERO, RIGHT_OF_ZERO = "var(--good,#1a6b4a)", "var(--bad,#9a3412)"
PLOT_WIDTH, TOP, BOTTOM = 460, 12, 40


def change_picture(changes: Mapping[str, Mapping[str, Estimate | None]], reference: str) -> Drawing:
    """changes: language or mean -> model -> relative change against `reference`."""
    models = list(next(iter(changes.values())))
    names = {row: language_name(row) for row in changes}
    names_width = 16 + max(text_width(name, 13) for name in names.values())
    left = names_width + 16 + max(text_width(model, 12) for model in models)
    bounds = [bound for row in changes.values() for change in row.values() if change for bound in _bounds(change)]
    low, high = min(0.0, *bounds), max(0.0, *bounds)
    margin = 0.04 * (high - low) or 0.01
    low, high = low - margin, high + margin
    group_height = len(models) * ROW + GAP
    bottom = TOP + len(changes) * group_height
    drawing = Drawing(
        left + PLOT_WIDTH + 16,
        bottom + BOTTOM,
        "Change in bits per byte",
        f"Against {reference}, per language and model",
    )

    def x(value: float) -> float:
        return left + PLOT_WIDTH * (value - low) / (high - low)

    for tick in ticks(low, high, 6):
        is_zero = abs(tick) < 1e-12
        drawing.line(x(tick), TOP - 4, x(tick), bottom, INK if is_zero else RULE)
        label = f"{100 * tick:+.3g}%".replace("-", "\u2212") if not is_zero else "0"
        drawing.text(x(tick), bottom + 16, label, fill=MUTED, anchor="middle")
    drawing.text(left + PLOT_WIDTH / 2, bottom + 33, f"bits per byte against {reference}", fill=MUTED, anchor="middle")
    for number, (row, by_model) in enumerate(changes.items()):
        top = TOP + number * group_height
        drawing.text(0, top + 13, names[row], size=13, bold=row.startswith("mean "))
        for index, (model, change) in enumerate(by_model.items()):
            y = top + index * ROW + 9
            drawing.text(names_width, y + 4, model, fill=MUTED)
            if change is not None:
                _mark(drawing, change, x, y, f"{names[row]}, {model}: {100 * change.value:+.2f}%")
    return drawing


def _mark(drawing: Drawing, change: Estimate, x: Callable[[float], float], y: float, tip: str) -> None:
    colour = LEFT_OF_ZERO if change.value < 0 else RIGHT_OF_ZERO
    low, high = _bounds(change)
    drawing.line(x(low), y, x(high), y, colour, 2)
    fill = colour if change.is_clear else PAGE
    drawing.rect(x(change.value) - MARK / 2, y - MARK / 2, MARK, MARK, fill, tip=tip, stroke=colour)


def _bounds(change: Estimate) -> tuple[float, float]:
    low, high = change.interval
    return (change.value, change.value) if low != low else (low, high)
