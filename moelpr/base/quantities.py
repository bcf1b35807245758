"""Large numbers as people write them: "24B" tokens, "500M", 1e9."""

import argparse
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated

from moelpr.base.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MAX_COUNT = 10**18


def parse_count(text: str) -> int:
    """The whole number that `text` means: digits, with "_" or "," between them, an exponent, or K, M, B or T behind.

    Raises:
        UserError: it is no whole number from 1 to 10^18.
    """
    match = re.fullmatch(
        r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?) ?([KMBT]?)", text.strip(), re.ASCII | re.I
    )
    number = Decimal(re.sub("[_,]", "", match[1])) * _UNITS[match[2].upper()] if match else Decimal(0)
    if number != number.to_integral_value() or not 1 <= number <= _MAX_COUNT:
        raise UserError(f"expected a whole number such as 24B, 500M or 1e9, up to 10^18, got {text[:40]!r}")
    return int(number)


def parse_bytes(text: str) -> int:
    """The bytes of a size such as 8GB, 500MB or 2T; UserError if it has another form."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?) ?([KMGT]?)B?", text.strip().upper())
    if match is None or (number := int(Decimal(match[1]) * _BYTES[match[2]])) < 1:
        raise UserError(f"expected a size such as 500MB or 5GB, got {text[:40]!r}")
    return number


def as_argument[T](parse: Callable[[str], T]) -> Callable[[str], T]:
    """A function as the type of a flag: argparse shows the message of this error only."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


Tokens = Annotated[int, {"type": as_argument(parse_count), "metavar": "N"}]  # the types of settings
Bytes = Annotated[int, {"type": as_argument(parse_bytes), "metavar": "SIZE"}]


def format_count(number: float) -> str:
    """The number in three digits and a unit: "24B", "1.5M"."""
    unit = next((unit for unit, size in reversed(_UNITS.items()) if number >= size), "")
    return f"{number / _UNITS[unit]:.3g}{unit}"


def format_minutes(minutes: float | None) -> str:
    """A time in its largest unit; a dash if it is unknown."""
    if minutes is None:
        return "–"
    for unit, size in (("days", 1440), ("hours", 60)):
        if minutes >= 2 * size:
            return f"{minutes / size:.3g} {unit}"
    if minutes >= 1.5:
        return f"{minutes:.0f} minutes"
    return "1 minute" if minutes >= 0.9 else f"{60 * minutes:.0f} s"
