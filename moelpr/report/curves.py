"""Line charts of a run's metrics over its steps, as SVG.

Curves differ in hue, dash and marker, so that no reader needs the hue. Of a long run a point stands for many steps:
the line is their mean, the band their lowest and highest.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelpr.report.svg import MARKERS, MUTED, RULE, SERIES, Drawing, text_width, tick_label, ticks
from moelpr.run_metrics import mean_of

MAX_POINTS = 400  # of a curve: a long run's report stays small
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 2 2")
_WIDTH, _HEIGHT = 452.0, 232.0
_LEFT, _RIGHT, _BOTTOM = 46.0, 10.0, 34.0
_LEGEND_LINE = 18.0


@dataclass(frozen=True)
class Curve:
    """One line of a chart; all its numbers are finite."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class _Thinned:
    """Means of neighbouring points, with their lowest and highest; size: steps of a point."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    size: int


def column(records: Iterable[Mapping[str, Any]], key: str, name: str = "", scale: float = 1.0) -> Curve:
    """The steps at which `key` was logged as a finite number, or as one number per layer, whose mean is drawn."""
    points = [(record["iteration"], mean_of(record.get(key))) for record in records]
    known = [(x, scale * y) for x, y in points if y is not None and math.isfinite(y)]
    return Curve(name, [x for x, _ in known], [y for _, y in known])


def line_chart(title: str, curves: Sequence[Curve], *, as_percent: bool = False, smooth: bool = True) -> str:
    """'' where there is nothing to draw. smooth: draw a running mean, and the steps themselves faintly."""
    drawn = [
        (number, curve, _thin(curve.x, curve.y, MAX_POINTS)) for number, curve in enumerate(curves) if len(curve.y) >= 2
    ]
    return _Chart(title, drawn, as_percent, smooth).render() if drawn else ""


def thinning_note(curves: Iterable[Curve]) -> str:
    """What a point of these curves stands for."""
    size = max((math.ceil(len(curve.x) / MAX_POINTS) for curve in curves), default=1)
    if size <= 1:
        return "Faint: the steps themselves; strong: their running mean."
    return (
        f"Each point stands for up to {size} steps: faint from their lowest to their highest value, strong the running "
        "mean."
    )


class _Chart:
    """A chart on its way to SVG."""

    def __init__(
        self, title: str, drawn: Sequence[tuple[int, Curve, _Thinned]], as_percent: bool, smooth: bool
    ) -> None:
        self.title, self.drawn, self.as_percent, self.smooth = title, drawn, as_percent, smooth
        self.lines = [_running_mean(points.mean) if smooth else points.mean for _, _, points in drawn]
        self.legend = self._legend_places()
        self.top = 28.0 + _LEGEND_LINE * (1 + max((row for _, row in self.legend), default=-1)) + 8
        self.inner_width, self.inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - 54 - _BOTTOM
        self.height = self.top + self.inner_height + _BOTTOM
        self.x_low = min(points.x[0] for _, _, points in drawn)
        self.x_high = max(points.x[-1] for _, _, points in drawn)
        self.y_low, self.y_high = self._y_range()

    def render(self) -> str:
        ends = ", ".join(
            f"{curve.name or 'value'} from {line[0]:.3g} to {line[-1]:.3g}"
            for (_, curve, _), line in zip(self.drawn, self.lines, strict=True)
        )
        drawing = Drawing(_WIDTH, self.height, self.title, ends)
        drawing.text(0, 15, self.title, size=13, bold=True)
        self._draw_legend(drawing)
        self._draw_axes(drawing)
        inside = Drawing(self.inner_width, self.inner_height)
        for number, _, points in self.drawn:
            self._draw_spread(inside, points, SERIES[number % len(SERIES)])
        for (number, _, points), line in zip(self.drawn, self.lines, strict=True):
            colour, dash = SERIES[number % len(SERIES)], _DASHES[number % len(_DASHES)]
            inside.path(self._places(points.x, line), colour, width=2, dash=dash)
        drawing.place(inside, _LEFT, self.top)
        if len(self.drawn) > 1:
            self._draw_markers(drawing)
        drawing.line(_LEFT, self.top + self.inner_height, _WIDTH - _RIGHT, self.top + self.inner_height, MUTED)
        return drawing.render()

    def _y_range(self) -> tuple[float, float]:
        """Of the strong lines, and of the faint ones but for their outermost twentieths, which may be cut off."""
        if self.as_percent:
            return 0.0, 1.0
        low, high = min(map(min, self.lines)), max(map(max, self.lines))
        if self.smooth:
            low = min(low, *(sorted(points.low)[len(points.low) // 20] for _, _, points in self.drawn))
            high = max(high, *(sorted(points.high)[-1 - len(points.high) // 20] for _, _, points in self.drawn))
        if high <= low:
            return low - 0.5, high + 0.5
        margin = 0.06 * (high - low)
        return low - margin, high + margin

    def _places(self, x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
        """In the frame of the curves."""
        span = (self.x_high - self.x_low) or 1
        return [
            (
                (a - self.x_low) / span * self.inner_width,
                (self.y_high - b) / (self.y_high - self.y_low) * self.inner_height,
            )
            for a, b in zip(x, y, strict=True)
        ]

    def _draw_spread(self, inside: Drawing, points: _Thinned, colour: str) -> None:
        if points.size > 1:
            edge = self._places(points.x, points.high) + self._places(points.x, points.low)[::-1]
            inside.area(edge, colour, 0.18)
        elif self.smooth:
            inside.path(self._places(points.x, points.mean), colour, width=1, opacity=0.28)

    def _draw_markers(self, drawing: Drawing) -> None:
        """A few on each line, at other places than its neighbours'."""
        for order, ((number, _, points), line) in enumerate(zip(self.drawn, self.lines, strict=True)):
            places = self._places(points.x, line)
            wanted = min(len(places), 6)
            shift = order / len(self.drawn) if len(places) > 12 else 0
            for step in range(wanted):
                x, y = places[min(len(places) - 1, round((step + shift) * (len(places) - 1) / max(1, wanted - 1)))]
                drawing.marker(_LEFT + x, self.top + y, MARKERS[number % len(MARKERS)], SERIES[number % len(SERIES)])

    def _legend_places(self) -> list[tuple[float, int]]:
        """x and row of each name; nothing for a single line, which the title names."""
        if len(self.drawn) == 1 and not self.drawn[0][1].name:
            return []
        places, x, row = [], _LEFT, 0
        for _, curve, _ in self.drawn:
            width = 36 + text_width(curve.name, 11.5) + 14
            if x + width > _WIDTH and x > _LEFT:
                x, row = _LEFT, row + 1
            places.append((x, row))
            x += width
        return places

    def _draw_legend(self, drawing: Drawing) -> None:
        for (x, row), (number, curve, _) in zip(self.legend, self.drawn, strict=False):
            y = 33 + _LEGEND_LINE * row
            colour = SERIES[number % len(SERIES)]
            drawing.path([(x, y), (x + 28, y)], colour, width=2, dash=_DASHES[number % len(_DASHES)])
            if len(self.drawn) > 1:
                drawing.marker(x + 14, y, MARKERS[number % len(MARKERS)], colour)
            drawing.text(x + 34, y + 4, curve.name, size=11.5, fill=MUTED)

    def _draw_axes(self, drawing: Drawing) -> None:
        for tick in ticks(self.y_low, self.y_high, 5):
            y = self.top + (self.y_high - tick) / (self.y_high - self.y_low) * self.inner_height
            drawing.line(_LEFT, y, _WIDTH - _RIGHT, y, RULE)
            label = f"{tick:.0%}" if self.as_percent else tick_label(tick)
            drawing.text(_LEFT - 7, y + 4, label, size=10.5, fill=MUTED, anchor="end")
        bottom = self.top + self.inner_height
        for tick in ticks(self.x_low, self.x_high, 5):
            x = _LEFT + (tick - self.x_low) / ((self.x_high - self.x_low) or 1) * self.inner_width
            drawing.line(x, bottom, x, bottom + 4, MUTED)
            drawing.text(x, bottom + 17, tick_label(tick), size=10.5, fill=MUTED, anchor="middle")
        drawing.text(_WIDTH - _RIGHT, self.height - 3, "training step", size=10.5, fill=MUTED, anchor="end")


def _thin(x: Sequence[float], y: Sequence[float], most: int) -> _Thinned:
    size = math.ceil(len(x) / most) if x else 1
    parts = [y[i : i + size] for i in range(0, len(y), size)]
    return _Thinned(
        x=[sum(part) / len(part) for part in (x[i : i + size] for i in range(0, len(x), size))],
        mean=[sum(part) / len(part) for part in parts],
        low=[min(part) for part in parts],
        high=[max(part) for part in parts],
        size=size,
    )


def _running_mean(values: list[float]) -> list[float]:
    """Mean over about a twentieth of the curve around each point, over what there is of it at the ends."""
    reach = len(values) // 40
    neighbours = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(part) / len(part) for part in neighbours]
