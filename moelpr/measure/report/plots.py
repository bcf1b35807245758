"""Charts as SVG, drawn by matplotlib: lines over training steps, changes with intervals, heat maps, trade-offs.

Every function returns one self-contained SVG document, which can also be pasted into a page. No chart needs color to be
understood: curves differ in dash and marker, bars and cells carry their name and number.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moelpr.measure.report.labels import label_points
from moelpr.measure.report.numbers import Interval, finite_mean, percent
from moelpr.measure.report.runs import Curve
from moelpr.measure.report.svg import INK, MUTED, PAGE, SERIES, TIP, new_axes, styled, to_svg, width_of, write_label

Array = NDArray[np.float64]

MAX_POINTS = 400  # per curve, so that the report of a long run stays small
_DASHES = ("-", (0, (7, 3)), (0, (2, 2)), (0, (9, 3, 2, 3)), (0, (4, 2)), (0, (1, 2)), (0, (12, 4)), (0, (6, 2, 2, 2)))
_MARKERS = "os^DXvP*"
_PER_ROW = 3  # heat maps in one line
_CELL_INK = ("#20262d", "#fefefe")  # on a light and on a dark cell; unlike INK and PAGE the same on a dark page
_OUTLINE = "#c2410c"


@dataclass(frozen=True)
class Panel:
    """One heat map."""

    title: str
    columns: Mapping[str, Sequence[float]]  # name -> one number per row; NaN leaves the cell empty
    rows: Sequence[str]  # names of the rows
    outlined: Collection[tuple[str, int]] = ()  # (column, index of the row) of cells with a frame
    split_after: int = 0  # number of columns before a thick line; 0 for no line
    # Title -> number of columns below it, from left to right.
    column_groups: Mapping[str, int] = field(default_factory=dict)


@styled
def line_chart(title: str, curves: Sequence[Curve], *, as_percent: bool = False, smooth: bool = True) -> str:
    """Curves over training steps as SVG; returns "" if no curve has two points.

    Args:
        as_percent: the numbers are fractions, shown as 0% to 100%.
        smooth: draw the running mean, and the steps themselves faintly. Without it, the numbers themselves.
    """
    drawn = [(number, curve, *_thin(curve)) for number, curve in enumerate(curves) if len(curve.y) >= 2]
    if not drawn:
        return ""
    names = [curve.name for _, curve, *_ in drawn]
    num_columns = 2 if max(map(len, names)) > 14 else 3
    if width_of([title], 13) > 440:  # a second line, behind the name of the run
        title = title.replace(": ", ":\n", 1)
    more = 16 * title.count("\n")
    header = 24 + more + 18 * math.ceil(len(names) / num_columns) * any(names)
    figure = Figure(figsize=(452 / 72, (header + 188) / 72))
    axes = figure.add_axes((46 / 452, 38 / (header + 188), 396 / 452, 144 / (header + 188)))
    axes.set_title(title, x=-46 / 396, pad=header - 12 - more, fontsize=13)
    shown, described = [], []
    for order, (number, curve, x, mean, low, high) in enumerate(drawn):
        color = SERIES[number % len(SERIES)]
        if len(x) < len(curve.x):
            axes.fill([*x, *x[::-1]], [*high, *low[::-1]], color=color, alpha=0.18, lw=0)
        elif smooth:
            axes.plot(x, mean, color=color, alpha=0.28, linewidth=1)
        line = _running_mean(mean) if smooth else mean
        spacing = max(1, len(line) // 5)
        style: dict[str, Any] = {"color": color, "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 2}
        marker = _MARKERS[number % len(_MARKERS)] if len(drawn) > 1 else None
        places = spacing * order // len(drawn), spacing  # apart from the markers of the other curves
        axes.plot(x, line, label=curve.name, marker=marker, markevery=places, **style)
        # The outermost twentieths of the faint lines may be cut off.
        shown += [*line, *([np.percentile(low, 5), np.percentile(high, 95)] if smooth else [])]
        described.append(f"{curve.name or 'value'} from {line[0]:.3g} to {line[-1]:.3g}")
    margin = 0.06 * (max(shown) - min(shown)) or 0.5
    axes.set_xlim(min(x[0] for _, _, x, *_ in drawn), max(x[-1] for _, _, x, *_ in drawn))
    axes.set_ylim((0, 1) if as_percent else (min(shown) - margin, max(shown) + margin))
    axes.set_xlabel("training step", loc="right", labelpad=1)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: _tick_label(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if as_percent else _tick_label(value))
    if any(names):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=num_columns, borderaxespad=0.3)
    return to_svg(figure, title, ", ".join(described))


def thinning_note(curves: Iterable[Curve]) -> str:
    """A note that says what a point of these curves represents."""
    size = max((math.ceil(len(curve.x) / MAX_POINTS) for curve in curves), default=1)
    if size <= 1:
        return "Faint: the individual steps; strong: their running mean."
    return (
        f"Each point represents up to {size} steps. Faint: the range from their lowest to their highest value; strong: "
        "the running mean."
    )


@styled
def change_chart(title: str, rows: Mapping[str, Mapping[str, Interval | None]], *, axis: str) -> str:
    """Bars from 0, one per row and model, with intervals. A hollow bar is a change whose interval contains 0.

    Args:
        rows: row -> model -> relative change (0.1 is 10% more); a row without models is a heading.
        axis: label of the axis, for example "bits per byte against base".
    """
    models = list(dict.fromkeys(model for changes in rows.values() for model in changes))
    ends = [end for changes in rows.values() for change in changes.values() if change for end in astuple(change)]
    ends = [-0.02, 0.02, *filter(math.isfinite, ends)]
    span = max(ends) - min(ends)
    height = sum(17 * len(changes) + 12 if changes else 26 for changes in rows.values())  # in pixels, as y
    figure, axes = new_axes(340, height)
    axes.set(xlim=(min(ends) - span / 4, max(ends) + span / 4), ylim=(height, 0), xlabel=axis)
    left = -22 - width_of(models, 12) - width_of((row for row, changes in rows.items() if changes), 13.5)
    y, described = 0.0, []
    for row, changes in rows.items():
        weight = "bold" if not changes or row.startswith("mean") else "normal"
        write_label(axes, row, (0, y + 8), (left, 0), fontsize=13.5, weight=weight)
        for model, change in changes.items():
            write_label(axes, model, (0, y + 8), (-8, 0), fontsize=12, color=MUTED, ha="right")
            text = percent(change.value if change else math.nan)
            described.append(f"{row}, {model}: {text}")
            if change is None or not math.isfinite(change.value):
                write_label(axes, text, (1, y + 8), (-4, 0), fontsize=12, color=MUTED, ha="right")
            else:
                bar = _draw_change(axes, y + 8, change, SERIES[models.index(model) % len(SERIES)])
                bar.set_gid(f"{TIP}{row}, {model}: {percent(change.value, 2)}")
            y += 17
        y += 12 if changes else 26
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.grid(axis="x")
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    digits = 0 if span > 0.05 else 1
    axes.xaxis.set_major_formatter(lambda value, _: percent(value, digits) if round(value, 9) else "0")
    for text, shift, ha in (("\u2190 better", -8, "right"), ("worse \u2192", 8, "left")):
        write_label(axes, text, (0, 0), (shift, 12), from_left=False, fontsize=12, color=MUTED, ha=ha)
    return to_svg(figure, title, "; ".join(described), bbox_inches="tight")


def _draw_change(axes: Axes, y: float, change: Interval, color: str) -> Artist:
    """The bar, its interval and its number."""
    fill = to_rgba(color, 0.38 if change.is_clear else 0)
    (bar,) = axes.barh(y, change.value, 13, facecolor=fill, edgecolor=color, linewidth=1.3)
    end = change.value
    if change.has_bounds:
        axes.plot([change.low, change.high], [y, y], color=INK, linewidth=1.6, marker="|")
        end = min(end, change.low) if change.value < 0 else max(end, change.high)
    shift, ha = (-5, "right") if change.value < 0 else (5, "left")
    write_label(axes, percent(change.value), (end, y), (shift, 0), from_left=False, fontsize=12, ha=ha)
    return bar


@styled
def learned_lost_chart(
    title: str,
    panels: Mapping[str, Mapping[str, tuple[Interval, Interval]]],
    *,
    x_axis: str,
    y_text: Callable[[float], str] = percent,
) -> str:
    """Settings of which each has two changes against a base, which is at (0, 0): points with their intervals.

    Args:
        panels: label of the y axis -> setting -> changes (x, y); the panels are next to each other.
        x_axis: label of the x axis, which all panels share; its changes are relative.
        y_text: writes a change of the y axis.
    """
    figure, described = None, []
    for number, (y_axis, settings) in enumerate(panels.items()):
        figure, axes = new_axes(360, 280, 470 * number, figure=figure)
        axes.set_title("" if number else title, pad=14)
        axes.axhline(0, color=INK, linewidth=1)
        axes.axvline(0, color=INK, linewidth=1)
        labels, bars = [("base", (0.0, 0.0))], []
        for index, (name, (x, y)) in enumerate(settings.items()):
            color = SERIES[index % len(SERIES)]
            described.append(f"{name}: {x_axis} {x.text(percent)}, {y_axis} {y.text(y_text)}")
            if not (math.isfinite(x.value) and math.isfinite(y.value)):
                continue
            for left, low, right, high in ((x.low, y.value, x.high, y.value), (x.value, y.low, x.value, y.high)):
                axes.plot([left, right], [low, high], color=color, linewidth=1.6, marker="|" if low == high else "_")
                bars += [(left, low, right, high)] if math.isfinite(left + low + right + high) else []
            (point,) = axes.plot(x.value, y.value, color=color, marker=_MARKERS[index % len(_MARKERS)], markersize=8)
            point.set_gid(f"{TIP}{described[-1]}")
            labels.append((name, (x.value, y.value)))
        axes.plot(0, 0, color=INK, marker="o", markersize=6)
        axes.grid()
        axes.margins(0.15)  # for labels
        axes.set(xlabel=f"{x_axis} (\u2190 better)", ylabel=f"{y_axis} (\u2193 better)")
        for axis, write in ((axes.xaxis, percent), (axes.yaxis, y_text)):
            # As fine as the tenths of a percent of the labels.
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(partial(_write_tick, write))
        label_points(axes, labels, bars)
    assert figure is not None
    return to_svg(figure, title, "; ".join(described), bbox_inches="tight")


@styled
def heat_maps(
    title: str,
    panels: Sequence[Panel],
    *,
    form: str = "{:.0%}",
    darkest: float = 1.0,
    corner: str = "",
    cell_width: float = 58,
) -> str:
    """Heat maps next to each other; every cell carries its number.

    Args:
        form: format of a cell's number.
        darkest: the number of the darkest color; 0 has the lightest.
        corner: what the rows are, written above their names.
        cell_width: in pixels.
    """
    cell_height = 24 if max(len(panel.rows) for panel in panels) <= 13 else 18
    label_width = max(width_of([corner, *panel.rows], 11) for panel in panels)
    columns_width = max(max(cell_width * len(p.columns), width_of([p.title], 13.5)) for p in panels)
    rows_height = cell_height * max(len(panel.rows) for panel in panels)
    figure, means = None, []
    for number, panel in enumerate(panels):
        width, height = cell_width * len(panel.columns), cell_height * len(panel.rows)
        left = (columns_width + label_width + 26) * (number % _PER_ROW)
        figure, axes = new_axes(width, height, left, (rows_height + 70) * (number // _PER_ROW), figure)
        axes.set(xlim=(0, len(panel.columns)), ylim=(len(panel.rows), 0))
        axes.spines.bottom.set_visible(False)
        axes.tick_params(length=0, bottom=False, top=True, labelbottom=False, labeltop=True, labelsize=11, pad=5)
        names = ["\n".join(word[:9] for word in name.split()[:2]) for name in panel.columns]
        axes.set_xticks(np.arange(len(names)) + 0.5, names)
        axes.set_yticks(np.arange(len(panel.rows)) + 0.5, panel.rows)
        axes.set_title(panel.title, pad=32 if panel.column_groups else 12, x=-label_width / width)
        write_label(axes, corner, (0, 0), (-5, 9), color=MUTED, ha="right")
        _draw_cells(axes, panel, form, darkest, 11 if cell_width > 40 else 10)
        start, above = 0, -(40 if any("\n" in name for name in names) else 26) / cell_height
        for group, count in panel.column_groups.items():
            axes.text(start + count / 2, above, group, color=MUTED, ha="center")
            axes.plot([start + 0.05, start + count - 0.05], [above + 0.2] * 2, color=MUTED, lw=1, clip_on=False)
            start += count
        parts = [f"{name} {form.format(finite_mean(values))}" for name, values in panel.columns.items()]
        means.append(f"{panel.title}: {', '.join(parts)}")
    assert figure is not None
    return to_svg(figure, title, ". ".join(means), bbox_inches="tight")


def _draw_cells(axes: Axes, panel: Panel, form: str, darkest: float, fontsize: float) -> None:
    """Cells of size 1 with their numbers, then frames and lines."""
    for column, (name, values) in enumerate(panel.columns.items()):
        for row, value in enumerate(values):
            if math.isfinite(value):
                fill, ink = cell_colors(value / darkest if darkest else 0)
                cell = axes.add_patch(Rectangle((column, row), 1, 1, facecolor=fill, edgecolor=PAGE))
                cell.set_gid(f"{TIP}{panel.title}, {name}, {panel.rows[row]}: {value:.3f}")
                place = column + 0.5, row + 0.5
                axes.text(*place, form.format(value), fontsize=fontsize, color=ink, ha="center", va="center_baseline")
    for name, row in panel.outlined:  # last, because a neighbor would cover the frame
        corner = list(panel.columns).index(name) + 0.02, row + 0.05
        axes.add_patch(Rectangle(corner, 0.96, 0.9, fill=False, edgecolor=_OUTLINE, linewidth=2.5))
    if panel.split_after:
        axes.axvline(panel.split_after, color=_CELL_INK[0], linewidth=2)


def cell_colors(fraction: float) -> tuple[str, str]:
    """Fill and text color of a cell; lightness falls from 0 to 1, so that the map works in black and white."""
    return to_hex(matplotlib.colormaps["Blues"](min(max(fraction, 0.0), 1.0))), _CELL_INK[fraction > 0.65]


def _write_tick(write: Callable[[float], str], value: float, _: int) -> str:
    return write(value) if round(value, 9) else "0"


def _tick_label(value: float) -> str:
    """A short number: 1500000 is "1.5M"."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}".replace("-", "\u2212")


def _thin(curve: Curve) -> tuple[Array, Array, Array, Array]:
    """At most MAX_POINTS points of a curve: x, mean, minimum and maximum of the steps that each represents."""
    starts = np.arange(0, len(curve.x), math.ceil(len(curve.x) / MAX_POINTS))
    counts = np.diff(np.append(starts, len(curve.x)))
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    means = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return *means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def _running_mean(values: Array) -> Array:
    """Mean over about a twentieth of the curve around each point, at the ends over the part that exists."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
