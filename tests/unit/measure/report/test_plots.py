import math
import re
from xml.etree import ElementTree

import pytest

from moelpr.measure.report.numbers import Interval
from moelpr.measure.report.plots import (
    Curve,
    Panel,
    change_chart,
    heat_maps,
    learned_lost_chart,
    line_chart,
    thinning_note,
)

SVG = "{http://www.w3.org/2000/svg}"
FALLING = Curve("original languages", list(range(100)), [5 - step / 50 for step in range(100)])
RISING = Curve("$\\alpha$ <b> & \u4e2d\u6587", list(range(100)), [1 + step / 50 for step in range(100)])

SETTINGS = {"a": (Interval(-0.1, -0.2, -0.05), Interval(0.1, 0.05, 0.15)), "<c>": (Interval(-0.3), Interval(0.02))}
SETTINGS["diverged"] = (Interval(math.nan), Interval(math.inf))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def charts() -> dict[str, str]:
    rows = {"Expanded": {}, "Greek": {"a": Interval(-0.1, -0.2, -0.05), "<b>": None}, "Turkish": {"a": Interval(0.3)}}
    panel = Panel("maps <i>", {"en": [0.25, math.nan], "el": [0.5, 1.0]}, ["layer 0", "layer 3"], {("el", 1)}, 1)
    return {
        "lines": line_chart("loss", [FALLING, RISING]),
        "changes": change_chart("changes", rows, axis="bits per byte against base"),
        "maps": heat_maps("maps", [panel, panel]),
        "learned": learned_lost_chart("learned", {"lost <b>": SETTINGS, "other": SETTINGS}, x_axis="expanded"),
    }


@pytest.mark.parametrize(
    ("name", "label"), [("lines", RISING.name), ("changes", "<b>"), ("maps", "maps <i>"), ("learned", "<c>")]
)
def test_chart_is_self_contained_accessible_and_reproducible(name: str, label: str) -> None:
    """Its labels are neither markup nor mathematics."""
    svg = charts()[name]
    assert label in texts(svg)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("viewBox")
    assert root[0].tag == f"{SVG}title" and root[0].text and root[1].tag == f"{SVG}desc" and root[1].text
    assert set(re.findall(r"https?://[^\"' <]+", svg)) == {"http://www.w3.org/2000/svg"}
    references = set(re.findall(r'(?:href="|url\()#(\w+)', svg))
    assert references <= {element.get("id") for element in root.iter()}
    assert "DejaVu" not in svg and "<style" not in svg and "metadata" not in svg
    assert svg == charts()[name]


def test_ids_of_two_charts_on_one_page_differ() -> None:
    first, second = (set(re.findall(r'\bid="([^"]*)"', line_chart(title, [FALLING]))) for title in ("a", "b"))
    assert first and not first & second


def test_what_was_learned_and_lost_is_drawn_with_intervals_but_not_what_has_no_number() -> None:
    svg = charts()["learned"]
    assert [texts(svg).count(name) for name in ("a", "<c>", "base", "diverged")] == [2, 2, 2, 0]
    assert "a: expanded \u221210.0% [\u221220.0%, \u22125.0%], other +10.0% [+5.0%, +15.0%]" in svg
    assert "diverged: expanded unavailable" in svg


def test_change_chart_shows_every_change_and_marks_unclear_ones() -> None:
    rows = {"Greek": {"clear": Interval(-0.1, -0.2, -0.05), "unclear": Interval(0.01, -0.02, 0.03), "none": None}}
    svg = change_chart("changes", rows, axis="")
    shown = texts(svg)
    assert "\u221210.0%" in shown and "+1.0%" in shown and "unavailable" in shown
    bars = dict(re.findall(r"<title>Greek, (\w+): [^<]*</title>\n<path [^>]*style=\"([^\"]*)\"", svg))
    assert "fill-opacity: 0.38" in bars["clear"] or "opacity: 0.38" in bars["clear"]
    assert "fill: none" in bars["unclear"] or "opacity: 0" in bars["unclear"]


def test_heat_map_shows_every_number_in_its_cell_and_leaves_missing_ones_empty() -> None:
    panel = Panel("stage2", {"English": [0.97, math.nan], "Greek": [0.1, 0.25]}, ["layer 0", "layer 2"])
    svg = heat_maps("maps", [panel])
    assert [text for text in texts(svg) if text.endswith("%")] == ["97%", "10%", "25%"]
    assert "layer 2" in texts(svg) and "stage2, Greek, layer 2: 0.250" in svg
    assert "English 97%" in svg and "nan" not in svg


def test_spike_in_a_thinned_curve_is_still_in_the_band() -> None:
    """One of 5,000 equal steps is at 9: the mean hides it, the band reaches it."""
    curve = Curve("", list(range(5000)), [9.0 if step == 2500 else 1.0 + step % 2 for step in range(5000)])
    (band,) = re.findall(r'd="([^"]*)z\s*"[^>]*clip-path[^>]*opacity: 0.18', line_chart("loss", [curve]))
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", band) if pair.strip()]
    assert min(heights) < 0 < sorted(heights)[1]  # above the chart, which cuts it off
    assert thinning_note([curve]).startswith("Each point represents up to 13 steps")
    assert thinning_note([Curve("", [1, 2], [1, 2])]).startswith("Faint: the individual steps")
