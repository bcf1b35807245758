"""How numbers are written."""

import math

import pytest

from moelpr.report.numbers import percent


@pytest.mark.parametrize(("change", "text"), [(-0.062, "\u22126.2%"), (0.009, "+0.9%"), (math.nan, "unavailable")])
def test_percent_has_a_sign(change: float, text: str) -> None:
    assert percent(change) == text
