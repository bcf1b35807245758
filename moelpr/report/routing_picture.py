"""Heat maps of routing; every cell carries its number, so colour is never alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moelpr.report.document import Row, Table
from moelpr.report.svg import MUTED, PAGE, Drawing, sequential_colour, text_width

_CELL_WIDTH, _LEFT, _TOP = 58.0, 62.0, 60.0


@dataclass(frozen=True)
class Panel:
    """columns: name -> a share of first choices per row; NaN where there were no tokens."""

    title: str
    columns: Mapping[str, Sequence[float]]
    rows: Sequence[str]


def layer_names(layers: Iterable[int]) -> list[str]:
    return [f"layer {layer}" for layer in layers]


def routing_pictures(panels: Sequence[Panel]) -> list[str]:
    """One drawing each; all have the same size of cells."""
    height = 26.0 if max(len(panel.rows) for panel in panels) <= 13 else 18.0
    return [_picture(panel, height) for panel in panels]


def routing_table(panels: Sequence[Panel]) -> Table:
    """The same numbers."""
    widest_first = sorted(panels, key=lambda panel: -len(panel.columns))
    names = list(dict.fromkeys(name for panel in widest_first for name in panel.columns))
    rows = []
    for panel in panels:
        rows.append(Row([panel.title], "group"))
        for row, title in enumerate(panel.rows):
            values = [panel.columns[name][row] if name in panel.columns else math.nan for name in names]
            rows.append(Row([title, *(f"{value:.0%}" if math.isfinite(value) else "–" for value in values)]))
    return Table(["first choice is an original expert", *names], rows)


def _picture(panel: Panel, height: float) -> str:
    width = max(_LEFT + _CELL_WIDTH * len(panel.columns), text_width(panel.title, 14)) + 4
    means = ", ".join(f"{name} {_mean(values):.0%}" for name, values in panel.columns.items())
    drawing = Drawing(width, _TOP + height * len(panel.rows) + 4, f"{panel.title}: original expert first", means)
    drawing.text(0, 16, panel.title, size=14, bold=True)
    for row, title in enumerate(panel.rows):
        drawing.text(_LEFT - 8, _TOP + (row + 0.5) * height + 4, title, size=11.5, anchor="end")
    for number, (name, values) in enumerate(panel.columns.items()):
        x = _LEFT + number * _CELL_WIDTH
        words = name.split()[:2]
        for line, word in enumerate(words):
            y = _TOP - 8 - 13 * (len(words) - 1 - line)
            drawing.text(x + _CELL_WIDTH / 2, y, word[:9], size=11, fill=MUTED, anchor="middle")
        for row, value in enumerate(values):
            if math.isfinite(value):
                tip = f"{panel.title}, {name}, {panel.rows[row]}: {value:.1%}"
                _draw_cell(drawing, x, _TOP + row * height, height, value, tip)
    return drawing.render()


def _draw_cell(drawing: Drawing, x: float, y: float, height: float, share: float, tip: str) -> None:
    fill, ink = sequential_colour(share)
    drawing.rect(x, y, _CELL_WIDTH, height, fill, tip=tip, stroke=PAGE)
    drawing.text(x + _CELL_WIDTH / 2, y + height / 2 + 4, f"{100 * share:.0f}%", size=11.5, fill=ink, anchor="middle")


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
