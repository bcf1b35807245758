"""What is worth a look while there is still time: judged from a run's records alone, each said once per onset.

Steps are judged in blocks of `window` steps, by their means: single steps are too noisy. A warning is said when its
condition starts to hold, and again only after a block in which it did not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Warning(NamedTuple):
    """kind: original_loss_rises, idle_expert, lpr_loss_stays or not_a_number."""

    kind: str
    message: str


@dataclass(frozen=True)
class Thresholds:
    """Percents; 0: never warn. window: steps per block."""

    original_rise: float = 10.0
    expert_share: float = 1.0
    lpr_fall: float = 1.0
    window: int = 50


@dataclass
class _Block:
    """Sums over the steps since the last judgement."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    token_share_LE: np.ndarray | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        self.steps += 1
        for name in ("lpr_loss", "lm_loss_original"):
            value = record.get(name)
            if value is not None:
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
        if record.get("token_share"):
            share_LE = np.array(record["token_share"], dtype=float)
            self.token_share_LE = share_LE if self.token_share_LE is None else self.token_share_LE + share_LE

    def mean(self, name: str) -> float:
        return self.sums[name] / self.counts[name] if self.counts.get(name) else math.nan


class EarlyWarnings:
    """Fed with every record in order; on a resumed run with those of before, too (`remember`)."""

    def __init__(self, stage: str, thresholds: Thresholds, lpr_loss_is_on: bool) -> None:
        self.stage, self.thresholds, self.lpr_loss_is_on = stage, thresholds, lpr_loss_is_on
        self._block = _Block()
        self._first_lpr_loss = self._first_original_loss = math.nan  # means of the first block that has them
        self._first_validation: dict[str, float] = {}  # language -> loss in nats per token
        self._holding: dict[str, set[Any]] = {}  # kind -> what it holds for

    def remember(self, record: Mapping[str, Any]) -> None:
        """A record of before the run was interrupted: what it warned of was said then."""
        if record.get("event") == "validation":
            self.validation(record)
        elif "event" not in record:
            self.step(record)

    def step(self, record: Mapping[str, Any]) -> list[Warning]:
        missing = {"loss"} if record.get("lm_loss") is None else set()
        warnings = []
        if self._onsets("not_a_number", missing):
            message = "the loss is not a number; lower --lr, or look at the data of this step"
            warnings.append(Warning("not_a_number", message))
        self._block.add(record)
        if self._block.steps == self.thresholds.window:
            warnings += self._idle_experts() + self._lpr_loss_stays() + self._original_training_loss_rises()
            self._block = _Block()
        return warnings

    def validation(self, event: Mapping[str, Any]) -> list[Warning]:
        """Original languages that have become dearer since the run's first pass (stage 1 alone: review repairs it)."""
        losses = {
            language: result["lm_loss"]
            for language, result in event["languages"].items()
            if result["group"] == "original" and result["lm_loss"] is not None
        }
        rises = {}
        for language, loss in losses.items():
            first = self._first_validation.setdefault(language, loss)
            if self._has_risen(loss, first):
                rises[language] = loss / first - 1
        new = self._onsets("original_loss_rises", set(rises))
        if not new:
            return []
        words = ", ".join(f"{language} {rises[language]:+.1%}" for language in rises if language in new)
        return [self._original_rises(f"the loss on held-out {words}")]

    def _original_training_loss_rises(self) -> list[Warning]:
        """The same from training text, where the stage trains on original-language text and nothing is held out."""
        loss = self._block.mean("lm_loss_original")
        if self._first_validation or math.isnan(loss):
            return []
        if math.isnan(self._first_original_loss):
            self._first_original_loss = loss
        rises = self._has_risen(loss, self._first_original_loss)
        if not self._onsets("original_loss_rises", {"training text"} if rises else set()):
            return []
        change = loss / self._first_original_loss - 1
        return [self._original_rises(f"the loss on the original languages' training text {change:+.1%}")]

    def _has_risen(self, loss: float, first: float) -> bool:
        percent = self.thresholds.original_rise
        return self.stage == "stage1" and percent > 0 and first > 0 and loss > (1 + percent / 100) * first

    def _original_rises(self, what: str) -> Warning:
        return Warning(
            "original_loss_rises",
            f"{what} since the start (warned of from +{self.thresholds.original_rise:g}%); review repairs some of it, "
            "a lower --lr or fewer steps keep it smaller",
        )

    def _idle_experts(self) -> list[Warning]:
        if self._block.token_share_LE is None or self.thresholds.expert_share <= 0:
            return []
        share_LE = self._block.token_share_LE / self._block.steps
        idle = np.argwhere(share_LE < self.thresholds.expert_share / 100).tolist()
        new = sorted(self._onsets("idle_expert", {(layer, expert) for layer, expert in idle}))
        if not new:
            return []
        words = [f"expert {expert} of MoE layer {layer} ({share_LE[layer, expert]:.2%})" for layer, expert in new[:4]]
        more = f" and {len(new) - 4} more" if len(new) > 4 else ""
        return [
            Warning(
                "idle_expert",
                f"fewer than {self.thresholds.expert_share:g}% of the last {self._block.steps} steps' tokens chose "
                f"{', '.join(words)}{more}; a larger --balance-loss-coeff spreads them",
            )
        ]

    def _lpr_loss_stays(self) -> list[Warning]:
        loss = self._block.mean("lpr_loss")
        if not self.lpr_loss_is_on or self.thresholds.lpr_fall <= 0 or math.isnan(loss):
            return []
        if math.isnan(self._first_lpr_loss):
            self._first_lpr_loss = loss
            return []
        first = self._first_lpr_loss
        stays = loss > (1 - self.thresholds.lpr_fall / 100) * first
        if not self._onsets("lpr_loss_stays", {"loss"} if stays else set()):
            return []
        return [
            Warning(
                "lpr_loss_stays",
                f"the LPR loss does not fall: {loss:.4g} over the last {self._block.steps} steps, {first:.4g} over the "
                "first; raise --lpr-loss-coeff or --lr, and look whether the language bits are right "
                "(data_tools/inspect_data.py)",
            )
        ]

    def _onsets(self, kind: str, holding: set[Any]) -> set[Any]:
        """Of what the condition holds for now, that for which it did not before."""
        new = holding - self._holding.get(kind, set())
        self._holding[kind] = holding
        return new
