"""Early stopping: held-out text decides which saved step is a run's result, and ends the run when it no longer helps.

Decided from the validation passes in metrics.jsonl, so that a run that was interrupted decides the same.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from megatron.core.datasets.utils import get_blend_from_list

from moelpr.base import ranks
from moelpr.base.files import write_text
from moelpr.base.languages import canonical
from moelpr.base.run_folder import METRICS_FILE, TRACKER_FILE, BestStep, as_step, saved_step
from moelpr.data.manifest import Manifest
from moelpr.data.mixing import num_tokens
from moelpr.model.metrics.run_metrics import LineParser
from moelpr.train.arguments.requested import RequestedRun
from moelpr.train.arguments.settings import RunSettings


class EarlyStop:
    """The validation passes of a run; every rank has the same."""

    def __init__(self, run: RequestedRun, settings: RunSettings) -> None:
        assert settings.save is not None
        self.save, self.last_step = settings.save, settings.last_step
        self.retain_interval: int = run.save_retain_interval or 0
        self.patience = run.args.early_stop_patience / (run.global_batch_size * run.args.seq_length)  # in steps
        self.weights = language_weights(settings.data_path, list(settings.validation_data))
        self.losses: dict[int, float] = {}  # step -> loss
        self.record: BestStep | None = None  # the run has ended with it
        start, metrics, parser = settings.start, self.save / METRICS_FILE, LineParser()
        if not start.is_resumed or start.selected_step is not None:
            return
        if (record := BestStep.read_if_there(self.save)) and record.planned == self.last_step:  # else it now trains on
            self.record = record
        for line in metrics.read_bytes().splitlines() if metrics.is_file() else ():
            with suppress(ValueError):  # the line of a killed run
                event = parser.parse(line) if b'"validation"' in line else None
                if event and 0 < event["iteration"] <= (start.saved_step or 0):
                    self.losses[event["iteration"]] = self.loss(event["languages"])

    def loss(self, languages: Mapping[str, Any]) -> float:
        """The mean loss of languages in nats per token, weighted as in training; Inf if one is unknown."""
        known = {name: languages.get(name, {}).get("lm_loss") for name, weight in self.weights.items() if weight}
        total = sum(self.weights[name] * (math.inf if loss is None else loss) for name, loss in known.items())
        return float(total / sum(self.weights.values()))

    def see(self, step: int, languages: Mapping[str, Any]) -> None:
        """Take the losses of a pass, which the last rank has. Every rank must call this."""
        loss = torch.tensor([self.loss(languages)], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.broadcast(loss, src=ranks.world_size() - 1)
        if step:  # the base's is no saved step
            self.losses[step] = loss.item()
        if ranks.is_first_rank():
            self.remove_steps()

    def best(self, until: float = math.inf) -> int:
        """The step with the lowest loss; 0 without one."""
        steps = [step for step, loss in self.losses.items() if step <= until and math.isfinite(loss)]
        return min(steps, key=lambda step: (self.losses[step], step), default=0)

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return self.record is not None or max(self.losses, default=0) - self.best() >= self.patience

    def end(self) -> BestStep | None:
        """Make the best step that of the folder, for all that reads it, and record it; None without a pass."""
        if self.record is None and (best := self.best()):
            self.remove_steps()
            made = saved_step(self.save) or best
            self.record = BestStep(best, self.losses[best], made, self.last_step)
            self.record.write(self.save)
        if self.record is not None:
            write_text(self.save / TRACKER_FILE, str(self.record.step))
        return self.record

    def remove_steps(self) -> None:
        """Remove saved steps before the latest, but for the best, and multiples of --save-retain-interval."""
        latest = saved_step(self.save) or 0
        for folder in self.save.glob("iter_*") if self.retain_interval else ():
            step = as_step(folder.name.removeprefix("iter_")) or latest
            if (
                step < latest
                and step % (self.retain_interval or 1)
                and step != self.best(latest)
                and not folder.is_symlink()
            ):
                shutil.rmtree(folder, ignore_errors=True)


def language_weights(data_path: Sequence[str], languages: Sequence[str]) -> dict[str, float]:
    """The part that each language has in the training text; equal ones if the corpora do not name them."""
    prefixes, shares = get_blend_from_list(list(data_path) or None) or ([], None)
    weights = dict.fromkeys(languages, 0.0)
    for prefix, share in zip(prefixes, shares or map(num_tokens, prefixes), strict=True):
        if (manifest := Manifest.read(prefix)) is not None:
            for name, count in manifest.languages.items():
                if canonical(name) in weights:
                    weights[canonical(name)] += share * count.tokens / max(manifest.tokens, 1)
    return weights if any(weights.values()) else dict.fromkeys(languages, 1.0)
