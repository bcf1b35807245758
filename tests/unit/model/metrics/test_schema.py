from pathlib import Path

from moelpr.model.metrics.schema import METRICS

METHOD = Path(__file__).parents[4] / "docs" / "method.md"


def test_every_metric_is_explained_once() -> None:
    documented = METHOD.read_text(encoding="utf-8")
    assert len(set(METRICS)) == len(METRICS)
    assert [metric for metric in METRICS if f"`{metric}`" not in documented] == []


def test_a_tensorboard_tag_has_a_place_for_each_axis() -> None:
    assert all(metric.tag.count("{}") == len(metric.axes) for metric in METRICS if metric.tag)
