"""Numbers and how they are written: intervals, relative changes, means."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import pydantic_core
from pydantic import Field, WrapValidator
from pydantic.dataclasses import dataclass

from moelpr.base.records import FOREIGN

# In files, NaN and infinite numbers are null.
Measured = Annotated[
    float, Field(allow_inf_nan=True), WrapValidator(lambda found, check: math.nan if found is None else check(found))
]


@dataclass(frozen=True, config=FOREIGN)
class Interval:
    """A number with its 95% confidence interval, whose bounds are NaN if there is none.

    Attributes:
        value: The number; null if it is infinite or NaN.
        low: The lower bound; null without an interval.
        high: The upper bound.
    """

    value: Measured
    low: Measured = math.nan
    high: Measured = math.nan

    @property
    def has_bounds(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def is_clear(self) -> bool:
        """For a change: whether there is an interval, and it does not contain 0."""
        return self.has_bounds and (self.low > 0 or self.high < 0)

    def text(self, write: Callable[[float], str]) -> str:
        """`write` of the value, then of the bounds in brackets if there are any."""
        return write(self.value) + (f" [{write(self.low)}, {write(self.high)}]" if self.has_bounds else "")


def percent(change: float, digits: int = 1) -> str:
    """A relative change with its sign: "−6.2%", "+0.9%", "unavailable"."""
    return f"{100 * change:+.{digits}f}%".replace("-", "\u2212") if math.isfinite(change) else "unavailable"


def signed(change: float) -> str:
    """A difference with its sign: "−6.20", "+0.90"."""
    return f"{change:+.2f}".replace("-", "\u2212")


def number_text(value: float | None, form: str) -> str:
    """A number in a cell; a dash if it is missing or not finite."""
    return "–" if value is None or not math.isfinite(value) else form.format(value)


def finite_mean(values: Iterable[float | None]) -> float:
    """The mean of the finite numbers; NaN without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def finite_json(content: Any, indent: int | None = None) -> str:
    """JSON of dicts and dataclasses, with null for NaN and infinite numbers, which JSON does not have."""
    return pydantic_core.to_json(content, indent=indent, inf_nan_mode="null").decode()
