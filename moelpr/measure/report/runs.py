"""A run folder: settings, metrics and state of a run, and curves of its steps."""

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.run_folder import FINISHED_FILE, METRICS_FILE, read_command, read_settings, read_versions
from moelpr.model.metrics.run_metrics import RunMetrics, Step, mean_of, read_run_metrics
from moelpr.model.metrics.schema import PEAK_MEMORY_GIB, STEP_TIME_S, TOKENS_PER_S
from moelpr.model.model_spec import ModelSpec

ENDS = 50  # first and last steps of a run whose values per layer are kept
_STALE_S = 600.0  # a run that wrote nothing for this long, and for 20 of its steps, has stopped


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    x: Sequence[float]  # training steps, ascending
    y: Sequence[float]  # one finite number per step


@dataclass(frozen=True)
class Run:
    """A run folder. settings, versions and arguments are empty if it has none."""

    folder: Path
    metrics: RunMetrics
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    num_ranks: int | None = None
    ranks_per_node: int | None = None
    moe_layers: tuple[int, ...] | None = None  # their numbers, in the order of values per layer; None if unknown
    is_finished: bool = False
    last_record_age_s: float = 0.0
    label: str = ""  # instead of the folder's name, which another run may have too

    @property
    def name(self) -> str:
        return self.label or self.folder.resolve().name

    @property
    def stage(self) -> str:
        return str(self.last.get("stage") or self.settings.get("stage") or "training")

    @property
    def last(self) -> Step:
        """The record of the last step; empty before the first."""
        return self.metrics.steps[-1] if self.metrics.steps else {}

    @property
    def step(self) -> int:
        return int(self.last.get("iteration", 0))

    @property
    def num_steps(self) -> int | None:
        """Steps when the run is finished; None if unknown."""
        steps = self.settings.get("train_iters")
        return steps if isinstance(steps, int) else None

    @property
    def progress(self) -> str:
        """The step in words: "20 of 100"."""
        return f"{self.step:,} of {self.num_steps:,}" if self.num_steps else f"{self.step:,}"

    @property
    def tokens_per_s(self) -> float | None:
        return self.median(TOKENS_PER_S)

    def median(self, key: str) -> float | None:
        """The median over all steps except the first, which includes the start of the program."""
        values = [record[key] for record in self.metrics.steps[1:] if record.get(key)]
        return statistics.median(values) if values else None

    @property
    def time_left_s(self) -> float:
        """The time until the last step; 0 if unknown."""
        return max(0, (self.num_steps or 0) - self.step) * (self.median(STEP_TIME_S) or 0.0)

    @property
    def training_time_s(self) -> float:
        """The time of all recorded steps; a step that was repeated after an interruption counts once."""
        return sum(record.get(STEP_TIME_S) or 0.0 for record in self.metrics.steps)

    @property
    def peak_memory_gib(self) -> float | None:
        return max((record.get(PEAK_MEMORY_GIB) or 0.0 for record in self.metrics.steps), default=0.0) or None

    @property
    def state(self) -> str:
        """The state: finished, running or stopped."""
        patience = max(_STALE_S, 20 * (self.median(STEP_TIME_S) or 0.0))
        return "finished" if self.is_finished else "running" if self.last_record_age_s < patience else "stopped"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs with distinct names: of runs in folders of one name, as much of the path as tells them apart.

    Raises:
        UserError: A folder is named twice, or is not a run.
    """
    paths = [folder.resolve() for folder in folders]
    runs = []
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{folder} is named twice; name it once")
        length = next(
            n for n in range(1, len(path.parts) + 1) if [p.parts[-n:] for p in paths].count(path.parts[-n:]) == 1
        )
        runs.append(replace(read_run(folder), label="/".join(path.parts[-length:])))
    return runs


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: It has no metrics.jsonl, or a damaged one.
    """
    metrics_file = folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass a run folder (the --save folder of training)")
    if not metrics_file.exists():
        runs = " ".join(sorted(str(path.parent) for path in folder.glob(f"*/{METRICS_FILE}")))
        if runs:
            raise UserError(f"{folder} is a folder of runs, without {METRICS_FILE}; use `moelpr report {runs}`")
        raise UserError(f"{folder} contains no {METRICS_FILE}; pass the folder of a run that has made a step")
    command = read_command(folder)
    moe = None
    with suppress(UserError):  # older or damaged; the numbers of layers are only labels
        moe = ModelSpec.read(folder).moe
    return Run(
        folder,
        read_run_metrics(metrics_file, layers_at_ends=ENDS),
        settings=read_settings(folder) or {},
        versions=read_versions(folder),
        arguments=command.arguments,
        num_ranks=command.num_ranks,
        ranks_per_node=command.ranks_per_node,
        moe_layers=moe.layers if moe else None,
        is_finished=(folder / FINISHED_FILE).exists(),
        last_record_age_s=time.time() - metrics_file.stat().st_mtime,
    )


def curve_of(records: Iterable[Mapping[str, Any]], key: str, name: str = "") -> Curve:
    """The steps that logged `key` as a finite number, or as one number per layer, of which the mean is taken."""
    points = [(record["iteration"], mean_of(record.get(key))) for record in records]
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    return Curve(name, [x for x, _ in known], [y for _, y in known])
