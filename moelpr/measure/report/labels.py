"""Labels of points in a chart, placed where they cover least."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from moelpr.measure.report.svg import MUTED, width_of, write_label

Box = tuple[float, float, float, float]  # left, low, right, high


def label_points(axes: Axes, labels: Sequence[tuple[str, tuple[float, float]]], bars: Sequence[Box] = ()) -> None:
    """Write each label near its point (x, y), where it covers least; a line leads to one that is farther away.

    Args:
        bars: Lines, horizontal or vertical, that labels should not cover either.
    """
    axes.get_xlim(), axes.get_ylim()  # they make matplotlib choose the limits, which the positions depend on
    scale = 72 / axes.figure.dpi
    points = [axes.transData.transform(place) * scale for _, place in labels]
    (left, low), (_, high) = axes.bbox.get_points() * scale
    taken = [_around(x, y, 5) for x, y in points]
    for bar in bars:
        (start, bottom), (end, top) = (axes.transData.transform(corner) * scale for corner in (bar[:2], bar[2:]))
        taken.append((start - 4, bottom - 1, end + 4, top + 1))
    sides = [(across, up) for across in (9, 27, 54, 90) for up in range(9, 130, 15)]
    shifts = [(across * a, up * b) for across, up in sides for a in (1, -1) for b in (1, -1)]
    for (text, place), (x, y) in zip(labels, points, strict=True):
        others = [box for box in taken if box != _around(x, y, 5)]
        costs: dict[tuple[float, float], float] = {}
        for shift in shifts:
            label, *line = _label_boxes(x, y, shift, width_of([text], 12))
            is_outside = label[0] < left or label[1] < low or label[3] > high  # there is room to the right
            hidden, crossed = (sum(_overlap(a, b) for a in boxes for b in others) for boxes in ([label], line))
            costs[shift] = math.hypot(*shift) + 1000 * (is_outside + hidden) + 10 * crossed
        best = min(costs, key=costs.__getitem__)
        label, *line = _label_boxes(x, y, best, width_of([text], 12))
        taken += [label, *line]
        leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkB": 4} if line else None
        style = {"ha": "right" if best[0] < 0 else "left", "arrowprops": leader}
        write_label(axes, text, place, best, from_left=False, fontsize=12, **style)


def _label_boxes(x: float, y: float, shift: tuple[float, float], width: float) -> list[Box]:
    """The boxes that a shifted label covers: its text, then points on its line, if it has one."""
    across, up = shift
    left = x + across - (width if across < 0 else 0)
    line = np.linspace(0.1, 0.9, 12).tolist() if max(abs(across), abs(up)) > 9 else []
    return [(left, y + up - 8, left + width, y + up + 8), *(_around(x + across * t, y + up * t, 1) for t in line)]


def _around(x: float, y: float, half: float) -> Box:
    return x - half, y - half, x + half, y + half


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
