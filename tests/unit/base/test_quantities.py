"""Large numbers as people write them."""

import pytest

from moelpr.base.errors import UserError
from moelpr.base.quantities import format_count, parse_count


def test_a_count_is_read_exactly() -> None:
    units = {"24B": 24 * 10**9, "1.5b": 15 * 10**8, "500M": 5 * 10**8, "0.3k": 300, "2 T": 2 * 10**12}
    digits = {"1e9": 10**9, "2.5E+3": 2500, "24_000": 24_000, "24,000": 24_000, " 7 ": 7}
    digits["123456789012345678"] = 123456789012345678  # a float would round it
    assert {text: parse_count(text) for text in units | digits} == units | digits


@pytest.mark.parametrize(
    "text", ["", "0", "1_000_000_000_000_000_001", "-3", "1.5", "24X", "B", "1e-3", "nan", "1e99", "１２", "2BB", "_1"]
)
def test_what_is_no_count_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(UserError, match="24B"):
        parse_count(text)


def test_a_count_is_shown_with_three_digits() -> None:
    shown = [format_count(number) for number in (1, 999, 1500, 24_000_000_000, 1_234_567, 3e12)]
    assert shown == ["1", "999", "1.5K", "24B", "1.23M", "3T"]
