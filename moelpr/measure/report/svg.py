"""The look that all charts share, sizes and labels in pixels, and the SVG that matplotlib's drawing becomes.

Text stays text, and colors are CSS variables of the page (templates/style.css) with their light value as fallback.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
INK, MUTED, RULE, PAGE = "#1f2933", "#5f6c7b", "#d9dee4", "#ffffff"
# Okabe and Ito's hues, which color-blind readers tell apart, darkened for a white page.
SERIES = ("#1d4f91", "#b35900", "#00735a", "#a3407f", "#3a86c8", "#8a6d00", "#6b7280", "#c03a2b")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAGE: "page"} | {
    color: f"series-{number}" for number, color in enumerate(SERIES)
}
TIP = "tip: "  # starts the gid of a shape that shows the rest when the pointer rests on it
_STYLE = matplotlib.rc_params_from_file(
    Path(__file__).parent / "templates" / "charts.mplstyle", use_default_template=False
)
_DEFAULTS = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
styled = matplotlib.rc_context(_DEFAULTS | _STYLE)  # independent of the user's matplotlibrc


def width_of(texts: Iterable[str], size: float) -> float:
    """Approximate width in pixels of the widest text."""
    return 0.58 * size * max(map(len, texts), default=0)


def new_axes(
    width: float, height: float, left: float = 0, top: float = 0, figure: Figure | None = None
) -> tuple[Figure, Axes]:
    """Axes of a size in pixels, in a figure that is saved with everything around them (bbox_inches="tight")."""
    figure = figure or Figure(figsize=(1, 1))
    return figure, figure.add_axes((left / 72, -(top + height) / 72, width / 72, height / 72))


def write_label(
    axes: Axes, text: str, place: tuple[float, float], shift: tuple[float, float], from_left: bool = True, **style: Any
) -> None:
    """Text next to a place (x, y), shifted by pixels. from_left: x is a fraction of the width."""
    coordinates = ("axes fraction" if from_left else "data", "data")
    style |= {"va": "center_baseline", "annotation_clip": False}
    axes.annotate(text, place, shift, xycoords=coordinates, textcoords="offset points", **style)


def to_svg(figure: Figure, title: str, description: str, **options: Any) -> str:
    """The SVG without date and version; the same input gives the same bytes."""
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    salt = hashlib.sha256(f"{title}\0{description}".encode()).hexdigest()  # no ID twice on a page
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it only measures; the reader has fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    head, body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)
    width, height = (math.ceil(float(size)) for size in re.findall(r'viewBox="0 0 (\S+) (\S+)"', head)[0])
    unneeded = r'<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;]*; | transform="rotate\(-0 [^"]*"'
    body = re.sub(unneeded, "", body, flags=re.DOTALL)
    body = re.sub(rf'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r">[^<]*<|\d+\.\d{3,}|#[0-9a-f]{6}\b", _shorten, body)
    body = re.sub(r"\s*\n\s*", "\n", re.sub(r" \n(?=[LMQCz\"])", "", body)).strip()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="{FONT}" stroke-linejoin="round">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>\n{body}\n"
    )


def _shorten(match: re.Match[str]) -> str:
    """Outside of text: a coordinate with two decimals, a color as the page's variable."""
    number = match[0]
    if number[0] == "#":
        return f"var(--{_VARIABLES[number]},{number})" if number in _VARIABLES else number
    return number if number[0] == ">" else f"{float(number):.2f}".rstrip("0").rstrip(".")
