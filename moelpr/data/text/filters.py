"""Conditions on what data sets record about their documents, such as `language_score >= 0.9 and not is_null(url)`.

The grammar is Python's, of which comparisons with constants, `and`, `or`, `not`, `in` with a list, and `is_null` are
allowed; nothing is evaluated by Python. A missing value is null, and a comparison with null is unknown, as in SQL and
pyarrow; a document is kept if its condition is true. Rows and JSON lines are judged by the same code.
"""

import ast
import operator
from collections.abc import Callable
from functools import partial
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
# The truth of a condition for a document; None if it is unknown.
type _Condition = Callable[[dict[str, Any]], bool | None]


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
        return self._condition(document) is True

    def _parsed(self, node: ast.expr) -> _Condition:
        match node:
            case ast.BoolOp(op, parts):
                return partial(_combined, [*map(self._parsed, parts)], isinstance(op, ast.And))
            case ast.UnaryOp(ast.Not(), part):
                return partial(_negated, self._parsed(part))
            case ast.Call(ast.Name("is_null"), [ast.Name(column)], []):
                return partial(_is_null, self._column(column))
            case ast.Compare(ast.Name(column), [ast.In()], [ast.List(values) | ast.Tuple(values)]):
                return partial(_compared, self._column(column), _is_in, [*map(_constant, values)])
            case ast.Compare(left, [ast.NotIn()], [right]):
                return partial(_negated, self._parsed(ast.Compare(left, [ast.In()], [right])))
            case ast.Compare(ast.Name(column), [op], [value]) if type(op) in _COMPARISONS:
                return partial(_compared, self._column(column), _COMPARISONS[type(op)], _constant(value))
            case ast.Compare(value, [op], [ast.Name() as column]) if type(op) in _COMPARISONS:
                return self._parsed(ast.Compare(column, [_SWAPPED.get(type(op), type(op))()], [value]))
        raise ValueError(f"{ast.unparse(node)[:40]} is not understood")

    def _column(self, name: str) -> str:
        if name not in self.columns:
            self.columns.append(name)
        return name


# Conditions are these functions but for their last argument, so that they can be pickled.


def _combined(parts: list[_Condition], is_all: bool, document: dict[str, Any]) -> bool | None:
    values = [part(document) for part in parts]
    if (not is_all) in values:
        return not is_all
    return None if None in values else is_all


def _negated(part: _Condition, document: dict[str, Any]) -> bool | None:
    value = part(document)
    return None if value is None else not value


def _is_null(column: str, document: dict[str, Any]) -> bool:
    return document.get(column) is None


def _compared(column: str, compare: Callable[[Any, Any], Any], constant: Any, document: dict[str, Any]) -> bool | None:
    """Whether a column compares so with a constant, or with a list of them."""
    if (content := document.get(column)) is None:
        return None
    for value in constant if isinstance(constant, list) else [constant]:
        if _kind(content) is not _kind(value):
            raise BadLine(f'the key "{column}" contains {json_type(content)}, which the filter compares with {value!r}')
    return bool(compare(content, constant))


def _is_in(content: Any, values: list[Any]) -> bool:
    return content in values


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
