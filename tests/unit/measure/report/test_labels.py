from itertools import combinations, product

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Text

from moelpr.measure.report.labels import label_points
from moelpr.measure.report.svg import new_axes


def test_labels_of_crowded_points_cover_nothing() -> None:
    """A cluster in a corner: no label lies on another, on a mark, or on the numbers of an axis."""
    figure, axes = new_axes(400, 260)
    cluster = [(-0.29, -0.042), (-0.286, -0.04), (-0.279, -0.043), (-0.286, -0.047), (-0.283, -0.049)]
    points = [*cluster, (-0.316, 0.102), (0.0, 0.0)]
    axes.plot(*zip(*points, strict=True), linestyle="")
    axes.margins(0.12)
    label_points(axes, [(f"setting {number}", point) for number, point in enumerate(points)])
    frame = axes.get_window_extent()
    renderer, boxes = RendererAgg(1000, 1000, figure.dpi), []
    for text in axes.texts:
        text.update_positions(renderer)  # type: ignore[attr-defined]
        boxes.append(Text.get_window_extent(text, renderer))  # without its line
    assert len(boxes) == len(points)
    assert all(frame.x0 <= box.x0 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    marks = [axes.transData.transform(point) for point in points]
    assert not any(box.contains(*mark) for box, mark in product(boxes, marks))
