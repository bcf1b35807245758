"""Charts as SVG, drawn by matplotlib: lines over training steps, changes with intervals, heat maps.

Every function returns one self-contained SVG document that can also be pasted into a page. Text stays text, colors are
CSS variables of the page (templates/style.css) with their light value as fallback, and no chart needs color to be
understood: curves differ in dash and marker, bars and cells carry their name and number.
"""

import hashlib
import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

MAX_POINTS = 400  # per curve, so that the report of a long run stays small
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
INK, MUTED, RULE, PAGE = "#1f2933", "#5f6c7b", "#d9dee4", "#ffffff"
# Okabe and Ito's hues, which color-blind readers tell apart, darkened for a white page.
SERIES = ("#1d4f91", "#b35900", "#00735a", "#a3407f", "#3a86c8", "#8a6d00", "#6b7280", "#c03a2b")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAGE: "page"} | {
    color: f"series-{number}" for number, color in enumerate(SERIES)
}
_DASHES = ("-", (0, (7, 3)), (0, (2, 2)), (0, (9, 3, 2, 3)), (0, (4, 2)), (0, (1, 2)), (0, (12, 4)), (0, (6, 2, 2, 2)))
_MARKERS = ("o", "s", "^", "D", "X", "v", "P", "*")
_CELL_INK = ("#20262d", "#fefefe")  # on a light and on a dark cell; unlike INK and PAGE the same on a dark page
_OUTLINE = "#c2410c"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # measures the text; the SVG names FONT
    "text.parse_math": False,  # a model's name may contain $
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
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
    "lines.solid_capstyle": "butt",
}
_styled = matplotlib.rc_context(_STYLE)


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
    drawn = [(number, curve, _thin(curve)) for number, curve in enumerate(curves) if len(curve.y) >= 2]
    if not drawn:
        return ""
    lines = [_running_mean(points.mean) if smooth else points.mean for _, _, points in drawn]
    has_legend = len(drawn) > 1 or bool(drawn[0][1].name)
    num_columns = 2 if any(len(curve.name) > 14 for _, curve, _ in drawn) else 3
    legend_height = 18 * math.ceil(len(drawn) / num_columns) + 4 if has_legend else 0
    width, top, height = 452, 28 + legend_height, 144
    ends = ", ".join(
        f"{curve.name or 'value'} from {line[0]:.3g} to {line[-1]:.3g}"
        for (_, curve, _), line in zip(drawn, lines, strict=True)
    )
    drawing = _Drawing(width, top + height + 40, title, ends)
    axes = drawing.axes(46, top, width - 56, height)
    for order, ((number, curve, points), line) in enumerate(zip(drawn, lines, strict=True)):
        color, dash = SERIES[number % len(SERIES)], _DASHES[number % len(_DASHES)]
        if points.size > 1:
            axes.fill([*points.x, *points.x[::-1]], [*points.high, *points.low[::-1]], color=color, alpha=0.18, lw=0)
        elif smooth:
            axes.plot(points.x, points.mean, color=color, alpha=0.28, linewidth=1)
        spacing = max(1, len(line) // 5)
        axes.plot(
            points.x, line, label=curve.name, color=color, linestyle=dash, linewidth=2, markersize=6,
            marker=_MARKERS[number % len(_MARKERS)] if len(drawn) > 1 else None,
            markevery=(spacing * order // len(drawn), spacing),  # apart from the markers of the other curves
        )  # fmt: skip
    axes.set_xlim(min(points.x[0] for *_, points in drawn), max(points.x[-1] for *_, points in drawn))
    axes.set_ylim(0, 1) if as_percent else axes.set_ylim(*_y_range(lines, [p for *_, p in drawn] if smooth else []))
    axes.set_xlabel("training step", loc="right", labelpad=1)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0%}" if as_percent else tick_label(value)),
    )
    if has_legend:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=num_columns, borderaxespad=0.3, borderpad=0,
            handlelength=2.6, columnspacing=1.4, labelspacing=0.35,
        )  # fmt: skip
    drawing.text(0, 15, title, size=13, bold=True)
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
    models = list(dict.fromkeys(model for by_model in rows.values() for model in by_model))
    changes = [c for by_model in rows.values() for c in by_model.values() if c and math.isfinite(c.value)]
    ends = [end for c in changes for end in (c if c.has_bounds else (c.value,))]
    low, high = min([-0.02, *ends]), max([0.02, *ends])
    names_width = max(_text_width(row, 13.5) for row in rows) + 14
    left = names_width + max((_text_width(model, 11.5) for model in models), default=0) + 10
    plot_width, label_room, bar, gap, top = 400, 52, 16, 12, 30
    tops, height = {}, 0.0
    for row, by_model in rows.items():
        tops[row] = height
        height += bar * len(by_model) + gap if by_model else 26
    sentence = "; ".join(
        f"{row}: " + ", ".join(f"{model} {percent(c.value if c else math.nan)}" for model, c in by_model.items())
        for row, by_model in rows.items()
        if by_model
    )
    drawing = _Drawing(left + plot_width + 8, top + height + 42, title, sentence)
    axes = drawing.axes(left, top, plot_width, height)
    margin = label_room * (high - low) / (plot_width - 2 * label_room)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(height, 0)
    for row, by_model in rows.items():
        y = top + tops[row] + (15 if not by_model else 12)
        drawing.text(0, y, row, size=13.5, bold=not by_model or row.startswith("mean"))
        for index, (model, change) in enumerate(by_model.items()):
            y = tops[row] + bar * (index + 0.5)
            color = SERIES[models.index(model) % len(SERIES)]
            drawing.text(left - 8, top + y + 4, model, size=11.5, color=MUTED, anchor="right")
            if change is None or not math.isfinite(change.value):
                drawing.text(left + plot_width - 4, top + y + 4, "unavailable", size=11, color=MUTED, anchor="right")
                continue
            fill = matplotlib.colors.to_rgba(color, 0.38 if change.is_clear else 0)
            (patch,) = axes.barh(y, change.value, bar - 4, facecolor=fill, edgecolor=color, linewidth=1.3)
            drawing.tip(patch, f"{row}, {model}: {percent(change.value, 2)}")
            end = change.value
            if change.has_bounds:
                axes.plot([change.low, change.high], [y, y], color=INK, linewidth=1.6, marker="|", markersize=6)
                end = min(end, change.low) if change.value < 0 else max(end, change.high)
            shift, anchor = (-5, "right") if change.value < 0 else (5, "left")
            axes.annotate(
                percent(change.value), (end, y), (shift, 0), textcoords="offset points", ha=anchor,
                va="center_baseline", fontsize=11.5,
            )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.grid(axis="y", visible=False)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: percent(value, 0 if abs(high - low) > 0.05 else 1) if round(value, 9) else "0")
    )
    axes.set_xlabel(axis, labelpad=2)
    zero = left + plot_width * (0 - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
    drawing.text(zero - 8, 16, "\u2190 better", size=11.5, color=MUTED, anchor="right")
    drawing.text(zero + 8, 16, "worse \u2192", size=11.5, color=MUTED)
    return drawing.render()


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
    left = max([_text_width(row, 11) for panel in panels for row in panel.rows] + [_text_width(corner, 11)]) + 10
    has_groups = any(panel.column_groups for panel in panels)
    header = 36 if any(" " in name for panel in panels for name in panel.columns) else 22
    top = 22 + header + (18 if has_groups else 0)
    width = max(left + cell_width * num_columns, *(_text_width(panel.title, 13.5) for panel in panels)) + 16
    height = top + cell_height * num_rows + 10
    means = ". ".join(
        f"{panel.title}: " + ", ".join(f"{name} {form.format(_mean(values))}" for name, values in panel.columns.items())
        for panel in panels
    )
    lines = math.ceil(len(panels) / per_row)
    drawing = _Drawing(width * min(per_row, len(panels)), height * lines, title, f"Means over the rows. {means}")
    axes = drawing.axes(0, 0, drawing.width, drawing.height)
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.axis("off")
    colors = matplotlib.colormaps["Blues"]
    for number, panel in enumerate(panels):
        x0, y0 = width * (number % per_row), height * (number // per_row)
        drawing.text(x0, y0 + 15, panel.title, size=13.5, bold=True)
        drawing.text(x0 + left - 8, y0 + top - 6, corner, size=11, color=MUTED, anchor="right")
        start = x0 + left
        for group, count in panel.column_groups.items():
            end = start + cell_width * count
            drawing.text((start + end) / 2, y0 + 34, group, size=11, color=MUTED, anchor="center")
            axes.plot([start + 3, end - 3], [y0 + 39, y0 + 39], color=MUTED, linewidth=1)
            start = end
        for row, name in enumerate(panel.rows):
            y = y0 + top + cell_height * (row + 0.5) + 4
            drawing.text(x0 + left - 8, y, name, size=11, color=MUTED, anchor="right")
        for column, (name, values) in enumerate(panel.columns.items()):
            x = x0 + left + cell_width * column
            words = name.split()[:2]
            for line, word in enumerate(words):
                y = y0 + top - 6 - 13 * (len(words) - 1 - line)
                drawing.text(x + cell_width / 2, y, word[:9], size=11, color=MUTED, anchor="center")
            for row, value in enumerate(values):
                if not math.isfinite(value):
                    continue
                fill, ink = cell_colors(value / darkest if darkest else 0, colors)
                y = y0 + top + cell_height * row
                cell = Rectangle((x, y), cell_width, cell_height, facecolor=fill, edgecolor=PAGE, linewidth=1)
                drawing.tip(axes.add_patch(cell), f"{panel.title}, {name}, {panel.rows[row]}: {value:.3f}")
                drawing.text(
                    x + cell_width / 2, y + cell_height / 2 + 4, form.format(value), size=11 if cell_width > 40 else 10,
                    color=ink, anchor="center",
                )  # fmt: skip
        for name, row in panel.outlined:  # last, because a neighbor would cover the frame
            corner_at = (x0 + left + cell_width * list(panel.columns).index(name) + 1, y0 + top + cell_height * row + 1)
            frame = Rectangle(corner_at, cell_width - 2, cell_height - 2, fill=False, edgecolor=_OUTLINE, linewidth=2.5)
            axes.add_patch(frame)
        if panel.split_after:
            x = x0 + left + cell_width * panel.split_after
            axes.plot(
                [x, x], [y0 + top - 2, y0 + top + cell_height * len(panel.rows) + 2], color=_CELL_INK[0], linewidth=2
            )
    return drawing.render()


def cell_colors(fraction: float, colors: matplotlib.colors.Colormap | None = None) -> tuple[str, str]:
    """Fill and text color of a cell; lightness falls from 0 to 1, so that the map works in black and white."""
    fill = (colors or matplotlib.colormaps["Blues"])(min(max(fraction, 0.0), 1.0))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in fill[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return matplotlib.colors.to_hex(fill), _CELL_INK[int(luminance < 0.2)]


def percent(change: float, digits: int = 1) -> str:
    """A relative change with its sign: "−6.2%", "+0.9%", "unavailable"."""
    return f"{100 * change:+.{digits}f}%".replace("-", "\u2212") if math.isfinite(change) else "unavailable"


def tick_label(value: float) -> str:
    """Short: 1500000 is "1.5M"."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}".replace("-", "\u2212")


@dataclass(frozen=True)
class _Thinned:
    """Means of neighboring points with their lowest and highest value; size: steps per point."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    size: int


def _thin(curve: Curve) -> _Thinned:
    size = math.ceil(len(curve.x) / MAX_POINTS)
    parts = [curve.y[i : i + size] for i in range(0, len(curve.y), size)]
    return _Thinned(
        x=[_mean(curve.x[i : i + size]) for i in range(0, len(curve.x), size)],
        mean=[_mean(part) for part in parts],
        low=[min(part) for part in parts],
        high=[max(part) for part in parts],
        size=size,
    )


def _running_mean(values: list[float]) -> list[float]:
    """Mean over about a twentieth of the curve around each point, over what there is of it at the ends."""
    reach = len(values) // 40
    return [_mean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def _y_range(lines: Sequence[list[float]], faint: Sequence[_Thinned]) -> tuple[float, float]:
    """Range of the strong lines, and of the faint ones except their outermost twentieths, which may be cut off."""
    low, high = min(map(min, lines)), max(map(max, lines))
    low = min([low, *(sorted(points.low)[len(points.low) // 20] for points in faint)])
    high = max([high, *(sorted(points.high)[-1 - len(points.high) // 20] for points in faint)])
    if high <= low:
        return low - 0.5, high + 0.5
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _mean(values: Sequence[float]) -> float:
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
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self._figure.add_axes(place)
        axes.patch.set_visible(False)
        return axes

    def text(
        self, x: float, y: float, text: str, *, size: float, color: str = INK, anchor: str = "left", bold: bool = False
    ) -> None:
        """y is the text's baseline."""
        self._figure.text(
            x / self.width, 1 - y / self.height, text, fontsize=size, color=color, ha=anchor, va="baseline",
            fontweight="bold" if bold else "normal",
        )  # fmt: skip

    def tip(self, artist: Artist, text: str) -> None:
        """Show `text` when the pointer rests on the artist."""
        artist.set_gid(f"tip-{len(self._tips)}")
        self._tips.append(text)

    def render(self) -> str:
        """The SVG without date and version, with rounded coordinates and the page's colors; same input, same bytes."""
        buffer = io.StringIO()
        salt = hashlib.sha256(f"{self._title}\0{self._description}".encode()).hexdigest()  # no ID twice on a page
        with matplotlib.rc_context({"svg.hashsalt": salt}):
            self._figure.savefig(buffer, format="svg", metadata={"Date": None})
        body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)[1]
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
        body = re.sub(
            r'<g id="tip-(\d+)">', lambda match: f"<g><title>{escape(self._tips[int(match[1])])}</title>", body
        )
        body = re.sub(r'<g id="[^"]*">', "<g>", body)
        body = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), body)
        body = re.sub(r"font-family: [^;]*; | transform=\"rotate\(-0 [^\"]*\"", "", body)
        body = re.sub(r"#[0-9a-f]{6}", lambda match: _page_color(match[0]), body)
        body = re.sub(r"\s*\n\s*", "\n", re.sub(r" \n(?=[LMQCz\"])", "", body)).strip()
        description = f"<desc>{escape(self._description)}</desc>" if self._description else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
            f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" '
            f'font-family="{FONT}" stroke-linejoin="round"><title>{escape(self._title)}</title>{description}\n{body}'
        )


def _page_color(color: str) -> str:
    return f"var(--{_VARIABLES[color]},{color})" if color in _VARIABLES else color
