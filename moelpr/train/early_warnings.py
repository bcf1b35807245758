"""Warnings about a run that is still training, derived from its metrics records and, about stops, measured times.

Steps are judged in blocks of `BLOCK` steps, by their means, because single steps are too noisy. A warning is logged
when its condition starts to hold, and again only after a block in which it did not hold.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from moelpr.model.metrics.run_metrics import Step, ValidationEvent
from moelpr.model.metrics.schema import LM_LOSS, LM_LOSS_OF, LPR_LOSS, TOKEN_SHARE

BLOCK = 50  # the steps that are judged together
ORIGINAL_RISE = 0.10  # the rise of the loss on original languages
EXPERT_SHARE = 0.01  # the share of the tokens
LPR_FALL = 0.01  # the fall of the LPR loss since the first block
SLOW_NODE = 1.15  # times the median of its pipeline stage


class EarlyWarning(NamedTuple):
    """One warning: what was measured, and the flags that help."""

    kind: str  # original_loss_rises, idle_expert, lpr_loss_stays, not_a_number, grace_too_short or slow_node
    message: str


class EarlyWarnings:
    """Sees every record in order; in a resumed run those of the interrupted run first."""

    def __init__(self, stage: str, lpr_loss_is_on: bool, first_expert: int = 0, grace_s: float | None = None) -> None:
        """`first_expert` is the first place of the routers that tokens can choose; `grace_s` None: unknown."""
        self.stage, self.lpr_loss_is_on = stage, lpr_loss_is_on
        self.first_expert, self.grace_s = first_expert, grace_s
        self._block: list[Step] = []  # records since the last judgment
        self._first_lpr_loss = self._first_original_loss = math.nan  # means of the first block that has them
        self._first_validation: dict[str, float] = {}  # language -> loss in nats per token
        self._slow: list[tuple[int, float]] = []  # the slowest nodes of the last steps
        self._active: dict[str, set[Any]] = {}  # kind -> the languages, experts, … for which its condition holds

    def see(self, record: Any) -> list[EarlyWarning]:
        """New warnings after a record."""
        if "event" not in record:
            return self.step(record)
        return self.validation(record) if record["event"] == "validation" else []

    def step(self, record: Step) -> list[EarlyWarning]:
        """New warnings after a training step."""
        message = "the loss is NaN or Inf; lower --lr, or check the data of this step"
        warnings = self._onset("not_a_number", record.get(LM_LOSS) is None, message)
        self._block.append(record)
        if len(self._block) == BLOCK:
            warnings += self._idle_experts() + self._lpr_loss_stays() + self._original_training_loss_rises()
            self._block = []
        return warnings

    def validation(self, event: ValidationEvent) -> list[EarlyWarning]:
        """New warnings after a validation pass: original languages whose loss has risen since the first pass.

        Only in stage 1, because stage 2 repairs such a rise.
        """
        rises = {}
        for language, result in event["languages"].items():
            loss = result.get("lm_loss")
            if result.get("group", "original") != "original" or loss is None:
                continue
            first = self._first_validation.setdefault(language, loss)
            if self._has_risen(loss, first):
                rises[language] = loss / first - 1
        new = self._onsets("original_loss_rises", set(rises))
        if not new:
            return []
        shown = ", ".join(f"{language} {rise:+.1%}" for language, rise in rises.items() if language in new)
        return self._original_rises(f"the loss on held-out {shown}")

    def saved(self, step_s: float, save_s: float) -> list[EarlyWarning]:
        """New warnings after a checkpoint is written, from its time and that of the longest step."""
        if self.grace_s is None:
            return []
        message = (
            f"a step takes up to {step_s:.3g} s and a checkpoint {save_s:.3g} s, together more than the "
            f"{self.grace_s:g} s (--grace-seconds) in which a run that is asked to stop must save; give it more time "
            "(sbatch --signal B:USR1@SECONDS, GraceTime, terminationGracePeriodSeconds), or save less "
            "(--save-trained-only)"
        )
        return self._onset("grace_too_short", step_s + save_s > self.grace_s, message)

    def timed(self, node: int, times_as_long: float) -> list[EarlyWarning]:
        """New warnings after a step, from its slowest node, if that is the same one for a whole block of steps."""
        self._slow = self._slow[1 - BLOCK :] + [(node, times_as_long)]
        least = min(times for _, times in self._slow)
        is_slow = len(self._slow) == BLOCK and least > SLOW_NODE and len({*dict(self._slow)}) == 1
        message = (
            f"the forward passes of node {node} take at least {least:.2f} times as long as those of others in the same "
            "pipeline stage; check its GPUs (clocks, temperature, links), or run without it"
        )
        return [EarlyWarning("slow_node", message)] if self._onsets("slow_node", {node} if is_slow else set()) else []

    def _original_training_loss_rises(self) -> list[EarlyWarning]:
        """Judge the loss on original-language training text, if there is some and nothing is held out."""
        loss = self._block_mean(LM_LOSS_OF["original"])
        if self._first_validation or math.isnan(loss):
            return []
        if math.isnan(self._first_original_loss):
            self._first_original_loss = loss
        rises = {"training text"} if self._has_risen(loss, self._first_original_loss) else set()
        if not self._onsets("original_loss_rises", rises):
            return []
        change = loss / self._first_original_loss - 1
        return self._original_rises(f"the loss on the original languages' training text {change:+.1%}")

    def _has_risen(self, loss: float, first: float) -> bool:
        return self.stage == "stage1" and first > 0 and loss > (1 + ORIGINAL_RISE) * first

    def _original_rises(self, what: str) -> list[EarlyWarning]:
        message = (
            f"{what} since the start (threshold +{ORIGINAL_RISE:.0%}); stage 2 repairs part of it, "
            "a lower --lr or fewer steps reduce it"
        )
        return [EarlyWarning("original_loss_rises", message)]

    def _idle_experts(self) -> list[EarlyWarning]:
        shares = [record[TOKEN_SHARE] for record in self._block if record.get(TOKEN_SHARE)]
        if not shares or self.stage == "stage0":  # its routers are untrained
            return []
        share_LE = np.array(shares, dtype=float).mean(axis=0)
        idle = np.argwhere(share_LE < EXPERT_SHARE).tolist()
        can_be_chosen = {(layer, expert) for layer, expert in idle if expert >= self.first_expert}
        new = sorted(self._onsets("idle_expert", can_be_chosen))
        if not new:
            return []
        shown = [f"expert {expert} of MoE layer {layer} ({share_LE[layer, expert]:.2%})" for layer, expert in new[:4]]
        more = f" and {len(new) - 4} more" if len(new) > 4 else ""
        message = (
            f"fewer than {EXPERT_SHARE:.0%} of the last {len(self._block)} steps' tokens chose "
            f"{', '.join(shown)}{more}; a larger --balance-loss-coeff spreads the tokens"
        )
        return [EarlyWarning("idle_expert", message)]

    def _lpr_loss_stays(self) -> list[EarlyWarning]:
        loss = self._block_mean(LPR_LOSS)
        if not self.lpr_loss_is_on or math.isnan(loss):
            return []
        if math.isnan(self._first_lpr_loss):
            self._first_lpr_loss = loss
            return []
        first = self._first_lpr_loss
        message = (
            f"the LPR loss does not fall: {loss:.4g} over the last {len(self._block)} steps, {first:.4g} over the "
            "first; raise --lpr-loss-coeff or --lr, and check the language bits (moelpr data inspect)"
        )
        return self._onset("lpr_loss_stays", loss > (1 - LPR_FALL) * first, message)

    def _block_mean(self, name: str) -> float:
        values = [record[name] for record in self._block if record.get(name) is not None]
        return sum(values) / len(values) if values else math.nan

    def _onset(self, kind: str, holds: bool, message: str) -> list[EarlyWarning]:
        """The warning, if its condition holds now and did not before."""
        return [EarlyWarning(kind, message)] if self._onsets(kind, {kind} if holds else set()) else []

    def _onsets(self, kind: str, active: set[Any]) -> set[Any]:
        """The subset of `active` (for which the condition holds now) for which it did not hold before."""
        new = active - self._active.get(kind, set())
        self._active[kind] = active
        return new
