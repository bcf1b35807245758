"""What a run's folder says about it, while it goes on and afterwards."""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.run_folder import COMMAND_FILE, FINISHED_FILE, METRICS_FILE, VERSIONS_FILE, read_json, read_settings
from moelpr.run_metrics import Record, RunMetrics, read_run_metrics

ENDS = 50  # steps at the start and the end of a run whose values per layer are kept
_STALE_S = 600.0  # a run that wrote nothing for so long, and for 20 of its steps, has stopped


@dataclass(frozen=True)
class Run:
    """A run folder. settings, versions and command are empty where it has none (an older version wrote none)."""

    folder: Path
    metrics: RunMetrics
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    num_ranks: int | None = None
    is_finished: bool = False
    last_record_age_s: float = 0.0

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def stage(self) -> str:
        return str(self.last.get("stage") or self.settings.get("stage") or "training")

    @property
    def last(self) -> Record:
        """Of the last step; empty before the first."""
        return self.metrics.steps[-1] if self.metrics.steps else {}

    @property
    def step(self) -> int:
        return int(self.last.get("iteration", 0))

    @property
    def num_steps(self) -> int | None:
        """As many as it is to make; None where it is not known."""
        return self.settings.get("train_iters")

    @property
    def step_time_s(self) -> float | None:
        """Median; the first step, which includes the start, left out."""
        times = [record["step_time_s"] for record in self.metrics.steps[1:] if record.get("step_time_s")]
        return statistics.median(times) if times else None

    @property
    def training_time_s(self) -> float:
        """Of all steps in the records; what was repeated after an interruption counts once."""
        return sum(record.get("step_time_s") or 0.0 for record in self.metrics.steps)

    @property
    def state(self) -> str:
        """finished, running or stopped."""
        if self.is_finished:
            return "finished"
        patience = max(_STALE_S, 20 * (self.step_time_s or 0.0))
        return "running" if self.last_record_age_s < patience else "stopped"

    @property
    def tokens_per_s(self) -> float | None:
        rates = [record["tokens_per_s"] for record in self.metrics.steps[1:] if record.get("tokens_per_s")]
        return statistics.median(rates) if rates else None

    @property
    def peak_memory_gib(self) -> float | None:
        peaks = [record["peak_memory_gib"] for record in self.metrics.steps if record.get("peak_memory_gib")]
        return max(peaks, default=None)


def read_run(folder: Path) -> Run:
    """Raises UserError where the folder holds no metrics.jsonl, or one that is damaged."""
    metrics_file = folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a run, what --save named")
    if not metrics_file.exists():
        raise UserError(f"{folder} holds no metrics.jsonl; give the folder of a run that has made its first step")
    command = read_json(folder / COMMAND_FILE) or {}
    return Run(
        folder,
        read_run_metrics(metrics_file, layers_at_ends=ENDS),
        settings=read_settings(folder) or {},
        versions=read_json(folder / VERSIONS_FILE) or {},
        arguments=[str(word) for word in command.get("arguments", [])],
        num_ranks=command.get("num_ranks"),
        is_finished=(folder / FINISHED_FILE).exists(),
        last_record_age_s=time.time() - metrics_file.stat().st_mtime,
    )
