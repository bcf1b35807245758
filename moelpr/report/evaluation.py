"""Reading what `python -m moelpr.evaluate` wrote: bits per byte with intervals, and routing per layer."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.errors import UserError


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, content: Any) -> "Estimate":
        """From a plain number, or value, low and high."""
        if not isinstance(content, Mapping):
            return cls(_number(content))
        return cls(*(_number(content.get(name)) for name in ("value", "low", "high")))

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass
class Evaluation:
    """Models in the order they were evaluated in, each language -> value; shares are per MoE layer."""

    original_languages: list[str] = field(default_factory=list)
    bits_per_byte: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    changes: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # relative, against the first model
    original_first_shares: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)  # numbers of the layers that have routers

    @property
    def languages(self) -> list[str]:
        """Original ones first."""
        found = [language for values in self.bits_per_byte.values() for language in values]
        found += [language for values in self.original_first_shares.values() for language in values]
        return sorted(dict.fromkeys(found), key=lambda language: language not in self.original_languages)


def read_evaluations(paths: list[Path]) -> Evaluation:
    """All files together, later ones adding to earlier ones. UserError for one that is no evaluation."""
    evaluation = Evaluation()
    for path in paths:
        try:
            _add(evaluation, json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check --evaluation") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is no evaluation of this version ({error}); give the JSON file that "
                "`python -m moelpr.evaluate` wrote"
            ) from error
    return evaluation


def _add(evaluation: Evaluation, content: Mapping[str, Any]) -> None:
    evaluation.original_languages += content.get("original_languages") or []
    for model, result in content["models"].items():
        for language, values in result["languages"].items():
            if "bits_per_byte" in values:
                evaluation.bits_per_byte.setdefault(model, {})[language] = Estimate.of(values["bits_per_byte"])
            if "bits_per_byte" in (values.get("change") or {}):
                change = Estimate.of(values["change"]["bits_per_byte"])
                evaluation.changes.setdefault(model, {})[language] = change
            share = values.get("original_expert_share") or {}
            per_layer = values.get("original_first_share") or share.get("per_layer")
            if per_layer:
                evaluation.original_first_shares.setdefault(model, {})[language] = [_number(v) for v in per_layer]
                evaluation.layers = list(values.get("layers") or share.get("layers") or range(len(per_layer)))


def _number(value: Any) -> float:
    return float(value) if value is not None else math.nan
