"""Early stopping: held-out text decides which saved step is a run's result, and ends the run when it no longer helps.

Decided from the validation passes in metrics.jsonl, so that a run that was interrupted decides the same.
"""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
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
        weights = language_weights(settings.data_path, list(settings.validation_data))
        self.weights = {name: weight for name, weight in weights.items() if weight}
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
                is_of_run = event and 0 < event["iteration"] <= (start.saved_step or 0)
                if event and is_of_run and self.weights.keys() <= event["languages"].keys():
                    self.losses[event["iteration"]] = self.loss(event["languages"])

    def loss(self, languages: Mapping[str, Any]) -> float:
        """The mean loss of languages in nats per token, weighted as in training; Inf if one is no number."""
        losses = {name: languages[name].get("lm_loss") for name in self.weights}
        total = sum(self.weights[name] * (math.inf if loss is None else loss) for name, loss in losses.items())
        return float(total / sum(self.weights.values()))

    def see(self, step: int, languages: Mapping[str, Any]) -> None:
        """Take the losses of a pass, which the last rank has. Every rank must call this."""
        loss = torch.tensor([self.loss(languages)], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.broadcast(loss, src=ranks.world_size() - 1)
        if step:  # the base's is no saved step
            self.losses[step] = loss.item()
        if ranks.is_first_rank():
            self.remove_steps()

    def best(self) -> int:
        """The step with the lowest loss, saved or not, and so the same on every rank; 0 without one."""
        return self._best_of(self.losses)

    def best_saved(self) -> int:
        """The step with the lowest loss of those on disk; 0 without one."""
        latest = saved_step(self.save) or 0
        folders = (path.name.removeprefix("iter_") for path in self.save.glob("iter_*"))
        return self._best_of(step for step in map(as_step, folders) if step and step <= latest)

    def _best_of(self, steps: Iterable[int]) -> int:
        scored = [step for step in steps if math.isfinite(self.losses.get(step, math.inf))]
        return min(scored, key=lambda step: (self.losses[step], step), default=0)

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        best = self.best()
        return self.record is not None or (best > 0 and max(self.losses) - best >= self.patience)

    def end(self) -> BestStep | None:
        """Make the best step that of the folder, for all that reads it, and record it; None without one."""
        if self.record is None and (best := self.best_saved()):
            self.remove_steps()
            made = saved_step(self.save) or best
            self.record = BestStep(best, self.losses[best], made, self.last_step)
            self.record.write(self.save)
        if self.record is not None:
            write_text(self.save / TRACKER_FILE, str(self.record.step))
        return self.record

    def remove_steps(self) -> None:
        """Remove saved steps before the latest, but for the best, and multiples of --save-retain-interval."""
        latest, best = saved_step(self.save) or 0, self.best_saved()
        for folder in self.save.glob("iter_*") if self.retain_interval else ():
            step = as_step(folder.name.removeprefix("iter_")) or latest
            if step < latest and step % (self.retain_interval or 1) and step != best and not folder.is_symlink():
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
