"""Conditions on what data sets record about their documents, such as `language_score >= 0.9 and not is_null(url)`.

The grammar is Python's, of which comparisons with constants, `and`, `or`, `not`, `in` with a list, and `is_null` are
allowed; nothing is evaluated by Python. A missing value is null, and a comparison with null is unknown, as in SQL and
pyarrow; a document is kept if its condition is true. Rows and JSON lines are judged by the same code.
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moelpr.base.errors import UserError
from moelpr.data.text.documents import BadLine, json_type

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
_GRAMMAR = "write conditions such as language_score >= 0.9 and language in ['el', 'eu'] and not is_null(url)"
_LONGEST = 10_000
# Column -> its least and its greatest value; None if they are unknown.
Bounds = Callable[[str], tuple[Any, Any] | None]


@dataclass(frozen=True)
class _Comparison:
    """A column compared with a constant, or with several; without a comparison: whether it is null."""

    column: str
    operator: type[ast.cmpop] | None = None
    values: tuple[Any, ...] = ()

    def of(self, document: dict[str, Any]) -> bool | None:
        content = document.get(self.column)
        if self.operator is None:
            return content is None
        if content is None:
            return None
        for value in self.values:
            if _kind(content) is not _kind(value):
                raise BadLine(
                    f'the key "{self.column}" contains {json_type(content)}, which the filter compares with {value!r}'
                )
        if self.operator in (ast.In, ast.NotIn):
            return (content in self.values) == (self.operator is ast.In)
        return bool(_COMPARISONS[self.operator](content, self.values[0]))

    def may_hold(self, bounds: Bounds) -> bool:
        extremes = bounds(self.column)
        if extremes is None or self.operator in (None, ast.NotEq, ast.NotIn):
            return True
        least, most = extremes
        if any(_kind(value) is not _kind(bound) for value in self.values for bound in extremes):
            return True  # its rows report it
        if self.operator in (ast.Lt, ast.LtE):
            return bool(_COMPARISONS[self.operator](least, self.values[0]))
        if self.operator in (ast.Gt, ast.GtE):
            return bool(_COMPARISONS[self.operator](most, self.values[0]))
        return any(least <= value <= most for value in self.values)


@dataclass(frozen=True)
class _Combination:
    """Conditions that are combined; one: its negation."""

    parts: list["_Comparison | _Combination"]
    is_all: bool = True

    def of(self, document: dict[str, Any]) -> bool | None:
        values = [part.of(document) for part in self.parts]
        if len(values) == 1:
            return None if values[0] is None else not values[0]
        if (not self.is_all) in values:
            return not self.is_all
        return None if None in values else self.is_all

    def may_hold(self, bounds: Bounds) -> bool:
        if len(self.parts) == 1:
            return True
        return (all if self.is_all else any)(part.may_hold(bounds) for part in self.parts)


class Filter:
    """A condition on documents.

    Args:
        text: The condition.

    Attributes:
        columns: The keys that it reads.

    Raises:
        UserError: The text is not a condition.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: list[str] = []
        try:
            if len(text) > _LONGEST:
                raise ValueError("it is too long")
            self._condition = self._parsed(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or str(error) or type(error).__name__
            raise UserError(f"the filter {text[:80]!r} is no condition ({reason}); {_GRAMMAR}") from None

    def keeps(self, document: dict[str, Any]) -> bool:
        """Whether a document meets the condition.

        Raises:
            BadLine: A value has another type than what it is compared with.
        """
        return self._condition.of(document) is True

    def may_keep(self, bounds: Bounds) -> bool:
        """Whether any of several documents may meet the condition, by the bounds of their values."""
        return self._condition.may_hold(bounds)

    def _parsed(self, node: ast.expr) -> "_Comparison | _Combination":
        match node:
            case ast.BoolOp(op, parts):
                return _Combination([self._parsed(part) for part in parts], isinstance(op, ast.And))
            case ast.UnaryOp(ast.Not(), part):
                return _Combination([self._parsed(part)])
            case ast.Call(ast.Name("is_null"), [ast.Name(column)], []):
                return _Comparison(self._column(column))
            case ast.Compare(
                ast.Name(column), [(ast.In() | ast.NotIn()) as op], [ast.List(values) | ast.Tuple(values)]
            ):
                return _Comparison(self._column(column), type(op), tuple(map(_constant, values)))
            case ast.Compare(ast.Name(column), [op], [value]) if type(op) in _COMPARISONS:
                return _Comparison(self._column(column), type(op), (_constant(value),))
            case ast.Compare(value, [op], [ast.Name(column)]) if type(op) in _COMPARISONS:
                return _Comparison(self._column(column), _SWAPPED.get(type(op), type(op)), (_constant(value),))
        raise ValueError(f"{ast.unparse(node)[:40]} is not understood")

    def _column(self, name: str) -> str:
        if name not in self.columns:
            self.columns.append(name)
        return name


def _constant(node: ast.expr) -> bool | int | float | str:
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value) | float(value))):
            return -value
        case ast.Constant(bool(value) | int(value) | float(value) | str(value)):
            return value
    raise ValueError(f"{ast.unparse(node)[:40]} is no number or text in quotes")


def _kind(value: Any) -> type:
    """The type of a value, in which whole and other numbers are one."""
    return float if type(value) in (int, float) else type(value)
