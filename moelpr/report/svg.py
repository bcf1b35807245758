"""The little SVG the report's charts need: text stays text, sizes in pixels of the drawing.

Colours that must change on a dark page are CSS variables of the page (style.py), with their light value for a drawing
that stands alone.
"""

import math
from collections.abc import Sequence
from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
PAGE, INK, MUTED, RULE = "var(--page,#fff)", "var(--ink,#1f2933)", "var(--muted,#5f6c7b)", "var(--rule,#d9dee4)"
# Told apart by hue for whoever sees it (Okabe and Ito's colours, darkened on white), and never by hue alone.
SERIES = tuple(
    f"var(--series-{number},{colour})"
    for number, colour in enumerate(
        ("#1d4f91", "#b35900", "#00735a", "#a3407f", "#3a86c8", "#8a6d00", "#5f6c7b", "#c03a2b")
    )
)
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "star")


class Drawing:
    """Shapes in the order they are drawn. y runs downwards."""

    def __init__(self, width: float, height: float, title: str = "", description: str = ""):
        self.width, self.height = width, height
        self._title, self._description = title, description
        self._shapes: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, tip: str = "", stroke: str | None = None,
        stroke_width: float | None = None,
    ) -> None:  # fmt: skip
        """tip: what a pointer resting on it shows."""
        inside = _element("title", escape(tip)) if tip else ""
        self._shapes.append(
            _element(
                "rect",
                inside,
                x=x,
                y=y,
                width=width,
                height=height,
                fill=fill,
                stroke=stroke,
                stroke_width=stroke_width,
            )
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = RULE, width: float = 1) -> None:
        self._shapes.append(_element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, stroke_width=width))

    def path(
        self,
        points: Sequence[tuple[float, float]],
        stroke: str,
        *,
        width: float = 2,
        dash: str | None = None,
        opacity: float | None = None,
    ) -> None:
        """An open line through `points`."""
        self._shapes.append(
            _element(
                "path",
                d=_path(points),
                fill="none",
                stroke=stroke,
                stroke_width=width,
                stroke_linejoin="round",
                stroke_dasharray=dash,
                stroke_opacity=opacity,
            )
        )

    def area(self, points: Sequence[tuple[float, float]], fill: str, opacity: float) -> None:
        """A filled shape with these corners."""
        self._shapes.append(_element("path", d=f"{_path(points)}Z", fill=fill, fill_opacity=opacity))

    def marker(self, x: float, y: float, shape: str, colour: str, size: float = 3.6) -> None:
        """shape: one of MARKERS; size: from its middle to its edge."""
        a = size
        corners = {
            "square": [(-a, -a), (a, -a), (a, a), (-a, a)],
            "triangle": [(0, -1.2 * a), (1.15 * a, 0.9 * a), (-1.15 * a, 0.9 * a)],
            "diamond": [(0, -1.35 * a), (1.35 * a, 0), (0, 1.35 * a), (-1.35 * a, 0)],
            "bar": [(-1.3 * a, -0.5 * a), (1.3 * a, -0.5 * a), (1.3 * a, 0.5 * a), (-1.3 * a, 0.5 * a)],
        }
        strokes = {"cross": [(-a, -a, a, a), (-a, a, a, -a)], "star": [(-a, 0, a, 0), (-a, -a, a, a), (-a, a, a, -a)]}
        if shape in corners:
            self.area([(x + dx, y + dy) for dx, dy in corners[shape]], colour, 1)
        elif shape in strokes:
            for x1, y1, x2, y2 in strokes[shape]:
                self.line(x + x1, y + y1, x + x2, y + y2, colour, 1.8)
        else:
            fill = PAGE if shape == "ring" else colour
            self._shapes.append(_element("circle", cx=x, cy=y, r=a, fill=fill, stroke=colour, stroke_width=1.6))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """y is the text's baseline. anchor: start, middle or end."""
        weight = "600" if bold else None
        self._shapes.append(
            _element("text", escape(text), x=x, y=y, font_size=size, fill=fill, text_anchor=anchor, font_weight=weight)
        )

    def place(self, other: "Drawing", x: float, y: float) -> None:
        """Put another drawing into this one; what lies outside its frame is cut off."""
        inside = "".join(other._shapes)
        self._shapes.append(
            _element("svg", inside, x=x, y=y, width=other.width, height=other.height, overflow="hidden")
        )

    def render(self) -> str:
        """A complete SVG document, also fit to stand inside HTML; it shrinks to the width it is given."""
        return _element(
            "svg",
            _element("title", escape(self._title))
            + (_element("desc", escape(self._description)) if self._description else "")
            + "".join(self._shapes),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {_n(self.width)} {_n(self.height)}",
            width=self.width,
            height=self.height,
            role="img",
            font_family=FONT,
        )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _element(name: str, inside: str = "", **attributes: str | float | None) -> str:
    """An XML element; `inside` is XML already. `stroke_width` is written stroke-width, None not at all."""
    written = "".join(
        f' {key.replace("_", "-")}="{escape(value) if isinstance(value, str) else _n(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>"


def text_width(text: str, size: float) -> float:
    """About how wide a sans-serif text is."""
    return sum(1.0 if ord(character) > 0x2E80 else 0.56 for character in text) * size


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """Short: 1500000 is "1.5M"."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}".replace("-", "\u2212")


def sequential_colour(share: float) -> tuple[str, str]:
    """Fill and a text colour that can be read on it. 0 is near white, 1 is dark blue.

    Lightness falls evenly in OKLab, a space where equal steps look equal (Björn Ottosson, 2020), so the scale also
    works in black and white and for colour-blind readers.
    """
    share = min(max(share, 0.0), 1.0)
    lightness = 0.975 - 0.625 * share
    chroma = 0.012 + 0.105 * math.sin(math.pi * 0.72 * share)
    hue = math.radians(225 + 35 * share)
    fill = _oklab_hex(lightness, chroma * math.cos(hue), chroma * math.sin(hue))
    return fill, "#1f2933" if lightness > 0.62 else "#ffffff"


def _oklab_hex(lightness: float, a: float, b: float) -> str:
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    channels = (
        12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
        for value in (min(max(value, 0.0), 1.0) for value in linear)
    )
    return "#" + "".join(f"{round(255 * value):02x}" for value in channels)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
