"""Results of moelpr model verify, which a report adds to runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Required, TypedDict

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.records import FOREIGN


class Verification(TypedDict, total=False):
    """The result of `moelpr model verify --json`, with fields that are only shown."""

    __pydantic_config__ = FOREIGN | {"extra": "allow"}  # type: ignore[misc]

    equal: Required[bool]  # whether the models are equal within the tolerances
    num_tensors: Required[int]  # the number of tensors that were compared
    max_abs_diff: float | None  # the largest difference of a tensor; null if it is infinite or NaN
    max_abs_logit_diff: float | None  # the largest difference of a logit
    same_next_token: float | None  # the fraction of tokens with the same most likely next token


def read_verifications(paths: Iterable[Path]) -> dict[str, Verification]:
    """File name without its suffix -> the last JSON line that `moelpr model verify --json` printed.

    Raises:
        UserError: A file is missing, or has no such line.
    """
    checks: dict[str, Verification] = {}
    for path in paths:
        if path.stem in checks:
            raise UserError(f"--verification {path} has the name of another one; rename it")
        remedy = "pass outputs of `moelpr model verify A B --json` as --verification"
        lines = [line for line in records.content(path, remedy).splitlines() if line.startswith(b"{")]
        checks[path.stem] = records.parse(Verification, lines[-1] if lines else b"", str(path), remedy)
    return checks


def check_result(check: Mapping[str, Any]) -> str:
    """The result of moelpr model verify in words."""
    keys = {"max_abs_diff": "tensor", "max_abs_logit_diff": "logit"}
    values = {name: check[key] for key, name in keys.items() if key in check}
    parts = [f"{name} {'Inf or NaN' if value is None else f'{value:.2g}'}" for name, value in values.items()]
    return f"largest difference of a {' and of a '.join(parts)}" if parts else "not measured"
