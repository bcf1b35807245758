"""Charts as SVG, drawn by matplotlib: lines over training steps, changes with intervals, heat maps.

Every function returns one self-contained SVG document, which can also be pasted into a page. Text stays text,
colors are CSS variables of the page (templates/style.css) with their light value as fallback, and no chart needs color
to be understood: curves differ in dash and marker, bars and cells carry their name and number.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_POINTS = 400  # per curve, so that the report of a long run stays small
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
INK, MUTED, RULE, PAGE = "#1f2933", "#5f6c7b", "#d9dee4", "#ffffff"
# Okabe and Ito's hues, which color-blind readers tell apart, darkened for a white page.
SERIES = ("#1d4f91", "#b35900", "#00735a", "#a3407f", "#3a86c8", "#8a6d00", "#6b7280", "#c03a2b")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAGE: "page"} | {
    color: f"series-{number}" for number, color in enumerate(SERIES)
}
_DASHES = ("-", (0, (7, 3)), (0, (2, 2)), (0, (9, 3, 2, 3)), (0, (4, 2)), (0, (1, 2)), (0, (12, 4)), (0, (6, 2, 2, 2)))
_MARKERS = "os^DXvP*"
_CELL_INK = ("#20262d", "#fefefe")  # on a light and on a dark cell; unlike INK and PAGE the same on a dark page
_OUTLINE = "#c2410c"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # measures the text; the SVG names FONT
    "text.parse_math": False,  # the name of a model may contain $
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "legend.fontsize": 11,
}
_DEFAULTS = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
_styled = matplotlib.rc_context(_DEFAULTS | _STYLE)  # whatever the user's matplotlibrc says


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        x: training steps, ascending.
        y: one finite number per step.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Interval(NamedTuple):
    """A number and the bounds of its 95% confidence interval, NaN if there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_bounds(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def is_clear(self) -> bool:
        """For a change: the interval does not contain 0."""
        return not self.has_bounds or self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        columns: name -> one number per row; NaN leaves the cell empty.
        rows: names of the rows.
        outlined: (column, index of the row) of cells with a frame.
        split_after: number of columns before a thick line; 0 for no line.
        column_groups: title -> number of columns below it, from left to right.
    """

    title: str
    columns: Mapping[str, Sequence[float]]
    rows: Sequence[str]
    outlined: Collection[tuple[str, int]] = ()
    split_after: int = 0
    column_groups: Mapping[str, int] = field(default_factory=dict)


@_styled
def line_chart(title: str, curves: Sequence[Curve], *, as_percent: bool = False, smooth: bool = True) -> str:
    """Curves over training steps.

    Args:
        as_percent: the numbers are fractions, shown as 0% to 100%.
        smooth: draw the running mean, and the steps themselves faintly. Without it, the numbers themselves.

    Returns:
        The SVG; "" if no curve has two points.
    """
    drawn = [(number, curve.name, _thin(curve)) for number, curve in enumerate(curves) if len(curve.y) >= 2]
    if not drawn:
        return ""
    lines = [_running_mean(points.mean) if smooth else points.mean for *_, points in drawn]
    names = [name for _, name, _ in drawn]
    num_columns = 2 if max(map(len, names)) > 14 else 3
    top = 32 + (18 * math.ceil(len(names) / num_columns) if any(names) else -4)
    ends = [f"{name or 'value'} from {line[0]:.3g} to {line[-1]:.3g}" for name, line in zip(names, lines, strict=True)]
    drawing = _Drawing(452, top + 184, title, ", ".join(ends))
    drawing.text(0, 15, title, size=13, bold=True)
    axes = drawing.axes(46, top, 396, 144)
    for order, ((number, name, points), line) in enumerate(zip(drawn, lines, strict=True)):
        color, dash = SERIES[number % len(SERIES)], _DASHES[number % len(_DASHES)]
        if points.size > 1:
            there, back = np.append(points.x, points.x[::-1]), np.append(points.high, points.low[::-1])
            axes.fill(there, back, color=color, alpha=0.18, lw=0)
        elif smooth:
            axes.plot(points.x, points.mean, color=color, alpha=0.28, linewidth=1)
        spacing = max(1, len(line) // 5)
        axes.plot(
            points.x, line, label=name, color=color, linestyle=dash, linewidth=2, markersize=6,
            marker=_MARKERS[number % len(_MARKERS)] if len(drawn) > 1 else None,
            markevery=(spacing * order // len(drawn), spacing),  # apart from the markers of the other curves
        )  # fmt: skip
    axes.set_xlim(min(points.x[0] for *_, points in drawn), max(points.x[-1] for *_, points in drawn))
    axes.set_ylim((0, 1) if as_percent else _y_range(lines, [points for *_, points in drawn] if smooth else []))
    axes.set_xlabel("training step", loc="right", labelpad=1)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: _tick_label(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if as_percent else _tick_label(value))
    if any(names):
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=num_columns, borderaxespad=0.3, borderpad=0,
            handlelength=2.6, columnspacing=1.4, labelspacing=0.35,
        )  # fmt: skip
    return drawing.render()


def thinning_note(curves: Iterable[Curve]) -> str:
    """What a point of these curves represents."""
    size = max((math.ceil(len(curve.x) / MAX_POINTS) for curve in curves), default=1)
    if size <= 1:
        return "Faint: the individual steps; strong: their running mean."
    return (
        f"Each point represents up to {size} steps. Faint: the range from their lowest to their highest value; strong: "
        "the running mean."
    )


@_styled
def change_chart(title: str, rows: Mapping[str, Mapping[str, Interval | None]], *, axis: str) -> str:
    """Bars from 0, one per row and model, with intervals. A hollow bar is a change whose interval contains 0.

    Args:
        rows: row -> model -> relative change (0.1 is 10% more); a row without models is a heading.
        axis: label of the axis, for example "bits per byte against base".
    """
    models = list(dict.fromkeys(model for changes in rows.values() for model in changes))
    known = [change for changes in rows.values() for change in changes.values() if change is not None]
    ends = [end for change in known for end in change if math.isfinite(end)]
    low, high = min([-0.02, *ends]), max([0.02, *ends])
    names_width = max((_text_width(row, 13.5) for row, changes in rows.items() if changes), default=0) + 12
    left = names_width + max((_text_width(model, 12) for model in models), default=0) + 10
    bar, top, width, label_room = 17, 30, 340, 52
    height = sum(bar * len(changes) + 12 if changes else 26 for changes in rows.values())
    described = [
        f"{row}: "
        + ", ".join(f"{model} {percent(change.value if change else math.nan)}" for model, change in m.items())
        for row, m in rows.items()
        if m
    ]
    drawing = _Drawing(left + width + 22, top + height + 42, title, "; ".join(described))
    axes = drawing.axes(left, top, width, height)
    margin = label_room * (high - low) / (width - 2 * label_room)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(height, 0)
    y = 0.0
    for row, changes in rows.items():
        drawing.text(0, top + y + (12 if changes else 15), row, size=13.5, bold=not changes or row.startswith("mean"))
        for model, change in changes.items():
            drawing.text(left - 8, top + y + 13, model, size=12, color=MUTED, anchor="right")
            if change is None or not math.isfinite(change.value):
                drawing.text(left + width - 4, top + y + 13, "unavailable", size=12, color=MUTED, anchor="right")
            else:
                color = SERIES[models.index(model) % len(SERIES)]
                drawing.tip(
                    _draw_change(axes, y + bar / 2, change, color), f"{row}, {model}: {percent(change.value, 2)}"
                )
            y += bar
        y += 12 if changes else 26
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.grid(axis="x")
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    digits = 0 if high - low > 0.05 else 1
    axes.xaxis.set_major_formatter(lambda value, _: percent(value, digits) if round(value, 9) else "0")
    axes.set_xlabel(axis, labelpad=2)
    zero = left + width * (margin - low) / (high - low + 2 * margin)
    drawing.text(zero - 8, 16, "\u2190 better", size=12, color=MUTED, anchor="right")
    drawing.text(zero + 8, 16, "worse \u2192", size=12, color=MUTED)
    return drawing.render()


def _draw_change(axes: Axes, y: float, change: Interval, color: str) -> Artist:
    """The bar, its interval and its number."""
    fill = to_rgba(color, 0.38 if change.is_clear else 0)
    (bar,) = axes.barh(y, change.value, 13, facecolor=fill, edgecolor=color, linewidth=1.3)
    end = change.value
    if change.has_bounds:
        axes.plot([change.low, change.high], [y, y], color=INK, linewidth=1.6, marker="|", markersize=6)
        end = min(end, change.low) if change.value < 0 else max(end, change.high)
    shift, anchor = (-5, "right") if change.value < 0 else (5, "left")
    axes.annotate(
        percent(change.value), (end, y), (shift, 0), textcoords="offset points", ha=anchor, va="center_baseline",
        fontsize=12,
    )  # fmt: skip
    return bar


@_styled
def heat_maps(
    title: str,
    panels: Sequence[Panel],
    *,
    form: str = "{:.0%}",
    darkest: float = 1.0,
    corner: str = "",
    cell_width: float = 58,
    per_row: int = 3,
) -> str:
    """Heat maps next to each other; every cell carries its number.

    Args:
        form: format of a cell's number.
        darkest: the number of the darkest color; 0 has the lightest.
        corner: what the rows are, written above their names.
        cell_width: in pixels.
        per_row: panels in one line.
    """
    num_rows, num_columns = max(len(p.rows) for p in panels), max(len(p.columns) for p in panels)
    cell_height = 24 if num_rows <= 13 else 18
    left = max(_text_width(name, 11) for panel in panels for name in (corner, *panel.rows)) + 10
    header = 36 if any(" " in name for panel in panels for name in panel.columns) else 22
    top = 22 + header + (18 if any(panel.column_groups for panel in panels) else 0)
    width = max(left + cell_width * num_columns, *(_text_width(panel.title, 13.5) for panel in panels)) + 16
    height = top + cell_height * num_rows + 10
    means = [
        f"{panel.title}: {', '.join(f'{name} {form.format(finite_mean(v))}' for name, v in panel.columns.items())}"
        for panel in panels
    ]
    drawing = _Drawing(
        width * min(per_row, len(panels)), height * math.ceil(len(panels) / per_row), title, ". ".join(means)
    )
    axes = drawing.axes(0, 0, drawing.width, drawing.height)  # in pixels
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.axis("off")
    for number, panel in enumerate(panels):
        x, y = width * (number % per_row), height * (number // per_row)
        drawing.text(x, y + 15, panel.title, size=13.5, bold=True)
        drawing.text(x + left - 8, y + top - 6, corner, size=11, color=MUTED, anchor="right")
        _draw_panel(drawing, axes, panel, x + left, y + top, cell_width, cell_height, form, darkest)
    return drawing.render()


def _draw_panel(
    drawing: "_Drawing", axes: Axes, panel: Panel, left: float, top: float, width: float, height: float, form: str,
    darkest: float,
) -> None:  # fmt: skip
    """The cells, of `width` and `height`, with the upper left corner of the first one at `left`, `top`."""
    start, above = left, top - (42 if any(" " in name for name in panel.columns) else 28)
    for group, count in panel.column_groups.items():
        end = start + width * count
        drawing.text((start + end) / 2, above, group, size=11, color=MUTED, anchor="center")
        axes.plot([start + 3, end - 3], [above + 5, above + 5], color=MUTED, linewidth=1)
        start = end
    for row, name in enumerate(panel.rows):
        drawing.text(left - 8, top + height * (row + 0.5) + 4, name, size=11, color=MUTED, anchor="right")
    for column, (name, values) in enumerate(panel.columns.items()):
        x = left + width * column
        words = name.split()[:2]
        for line, word in enumerate(reversed(words)):
            drawing.text(x + width / 2, top - 6 - 13 * line, word[:9], size=11, color=MUTED, anchor="center")
        for row, value in enumerate(values):
            if not math.isfinite(value):
                continue
            fill, ink = cell_colors(value / darkest if darkest else 0)
            y = top + height * row
            cell = axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=PAGE, linewidth=1))
            drawing.tip(cell, f"{panel.title}, {name}, {panel.rows[row]}: {value:.3f}")
            size = 11 if width > 40 else 10
            drawing.text(x + width / 2, y + height / 2 + 4, form.format(value), size=size, color=ink, anchor="center")
    for name, row in panel.outlined:  # last, because a neighbor would cover the frame
        corner = left + width * list(panel.columns).index(name) + 1, top + height * row + 1
        axes.add_patch(Rectangle(corner, width - 2, height - 2, fill=False, edgecolor=_OUTLINE, linewidth=2.5))
    if panel.split_after:
        x = left + width * panel.split_after
        axes.plot([x, x], [top - 2, top + height * len(panel.rows) + 2], color=_CELL_INK[0], linewidth=2)


def cell_colors(fraction: float) -> tuple[str, str]:
    """Fill and text color of a cell; lightness falls from 0 to 1, so that the map works in black and white."""
    fill = matplotlib.colormaps["Blues"](min(max(fraction, 0.0), 1.0))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in fill[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return to_hex(fill), _CELL_INK[int(luminance < 0.22)]


def percent(change: float, digits: int = 1) -> str:
    """A relative change with its sign: "−6.2%", "+0.9%", "unavailable"."""
    return f"{100 * change:+.{digits}f}%".replace("-", "\u2212") if math.isfinite(change) else "unavailable"


def _tick_label(value: float) -> str:
    """Short: 1500000 is "1.5M"."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}".replace("-", "\u2212")


class _Points(NamedTuple):
    """A curve thinned to at most MAX_POINTS points, each with mean, minimum and maximum of `size` steps."""

    x: Array
    mean: Array
    low: Array
    high: Array
    size: int


def _thin(curve: Curve) -> _Points:
    size = math.ceil(len(curve.x) / MAX_POINTS)
    starts = np.arange(0, len(curve.x), size)
    counts = np.diff(np.append(starts, len(curve.x)))
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    x_mean, y_mean = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return _Points(x_mean, y_mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts), size)


def _running_mean(values: Array) -> Array:
    """Mean over about a twentieth of the curve around each point, at the ends over the part that exists."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _y_range(lines: Sequence[Array], faint: Sequence[_Points]) -> tuple[float, float]:
    """Range of the strong lines, and of the faint ones except their outermost twentieths, which may be cut off."""
    low = min([*map(np.min, lines), *(np.percentile(points.low, 5) for points in faint)])
    high = max([*map(np.max, lines), *(np.percentile(points.high, 95) for points in faint)])
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def finite_mean(values: Sequence[float]) -> float:
    """Mean of the finite numbers; NaN if there is none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _text_width(text: str, size: float) -> float:
    """Approximate width of sans-serif text in pixels."""
    return sum(1.0 if ord(character) > 0x2E80 else 0.56 for character in text) * size


class _Drawing:
    """A matplotlib figure measured in pixels from its upper left corner, and its way to SVG."""

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        self.width, self.height = math.ceil(width), math.ceil(height)
        self._figure = Figure(figsize=(self.width / 72, self.height / 72), dpi=72)  # SVG has 72 pixels per inch
        self._figure.patch.set_visible(False)
        self._title, self._description = title, description
        self._tips: list[str] = []

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self.width, self.height
        axes = self._figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
        axes.patch.set_visible(False)
        return axes

    def text(
        self, x: float, y: float, text: str, *, size: float, color: str = INK, anchor: str = "left", bold: bool = False
    ) -> None:
        """y is the text's baseline."""
        weight = "bold" if bold else "normal"
        place = x / self.width, 1 - y / self.height
        self._figure.text(*place, text, size=size, color=color, ha=anchor, va="baseline", weight=weight)

    def tip(self, artist: Artist, text: str) -> None:
        """Show `text` when the pointer rests on the artist."""
        artist.set_gid(f"tip-{len(self._tips)}")
        self._tips.append(text)

    def render(self) -> str:
        """The SVG without date and version; the same input gives the same bytes."""
        buffer = io.StringIO()
        salt = hashlib.sha256(f"{self._title}\0{self._description}".encode()).hexdigest()  # no ID twice on a page
        with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # it only measures; the reader has fonts
            self._figure.savefig(buffer, format="svg", metadata={"Date": None})
        body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)[1]
        unneeded = r'<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;]*; | transform="rotate\(-0 [^"]*"'
        body = re.sub(unneeded, "", body, flags=re.DOTALL)
        body = re.sub(
            r'<g id="tip-(\d+)">', lambda match: f"<g><title>{escape(self._tips[int(match[1])])}</title>", body
        )
        body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
        body = re.sub(r">[^<]*<|\d+\.\d{3,}|#[0-9a-f]{6}\b", _shorten, body)
        body = re.sub(r"\s*\n\s*", "\n", re.sub(r" \n(?=[LMQCz\"])", "", body)).strip()
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="{FONT}" stroke-linejoin="round">'
            f"<title>{escape(self._title)}</title><desc>{escape(self._description)}</desc>\n{body}\n"
        )


def _shorten(match: re.Match[str]) -> str:
    """Outside of text: a coordinate with two decimals, a color as the page's variable."""
    found = match[0]
    if found[0] == "#":
        return f"var(--{_VARIABLES[found]},{found})" if found in _VARIABLES else found
    return found if found[0] == ">" else f"{float(found):.2f}".rstrip("0").rstrip(".")
