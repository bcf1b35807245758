"""The little SVG the report's charts need: text stays text, sizes in pixels of the drawing."""

import math
from collections.abc import Sequence
from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
INK, MUTED, RULE = "#1f2933", "#5f6c7b", "#d9dee4"


class Drawing:
    """Shapes in the order they are drawn. y runs downwards."""

    def __init__(self, width: float, height: float, title: str, description: str):
        self.width, self.height = width, height
        self._title, self._description = title, description
        self._shapes: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, tip: str = "", stroke: str = ""
    ) -> None:
        """tip: what a pointer resting on it shows."""
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        outline = f' stroke="{stroke}"' if stroke else ""
        self._shapes.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{fill}"{outline}>{inside}</rect>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = RULE, width: float = 1) -> None:
        self._shapes.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" stroke="{stroke}" stroke-width="{width}"/>'
        )

    def path(
        self,
        points: Sequence[tuple[float, float]],
        stroke: str,
        *,
        width: float = 1.8,
        dash: str = "",
        opacity: float = 1,
    ) -> None:
        """An open line through `points`."""
        route = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        faint = f' stroke-opacity="{opacity}"' if opacity < 1 else ""
        self._shapes.append(
            f'<path d="{route}" fill="none" stroke="{stroke}" stroke-width="{width}" stroke-linejoin="round"{dashes}{faint}/>'
        )

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
        weight = ' font-weight="600"' if bold else ""
        self._shapes.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def place(self, other: "Drawing", x: float, y: float) -> None:
        """Put another drawing into this one; what lies outside its frame is cut off."""
        self._shapes.append(
            f'<svg x="{_n(x)}" y="{_n(y)}" width="{_n(other.width)}" height="{_n(other.height)}" overflow="hidden">'
            f"{''.join(other._shapes)}</svg>"
        )

    def render(self) -> str:
        """A complete SVG document, also fit to stand inside HTML; it shrinks to the width it is given."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(self.width)} {_n(self.height)}" '
            f'width="{_n(self.width)}" height="{_n(self.height)}" role="img" font-family="{FONT}">'
            f"<title>{escape(self._title)}</title><desc>{escape(self._description)}</desc>{''.join(self._shapes)}</svg>"
        )


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
    lightness = 0.97 - 0.60 * share
    chroma = 0.015 + 0.125 * math.sin(math.pi * (0.08 + 0.62 * share))
    hue = math.radians(190 + 70 * share)
    return _oklab_hex(lightness, chroma * math.cos(hue), chroma * math.sin(hue)), INK if lightness > 0.68 else "#ffffff"


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
