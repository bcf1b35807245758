"""The destinations of a run's records: metrics.jsonl, TensorBoard, trackers, and stderr (a bar or lines).

A record is a training step or an event (a validation pass or a warning). The last rank writes them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from megatron.training import get_tensorboard_writer
from tqdm import tqdm

from moelpr.base import ranks
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.run_folder import METRICS_FILE
from moelpr.model.metrics.run_metrics import HeldOutLoss, LineParser, Step, ValidationEvent, WarningEvent, bits_of
from moelpr.model.metrics.schema import METRICS, STEP_TIME_S
from moelpr.train.arguments.settings import RunSettings
from moelpr.train.early_warnings import EarlyWarning, EarlyWarnings
from moelpr.train.track.tracking import Tracking, values_of


class RunLog:
    """Opened by the first record, which removes what an interrupted run wrote after its last checkpoint."""

    def __init__(
        self,
        settings: RunSettings,
        early_warnings: EarlyWarnings,
        track: Callable[[bool], Tracking | None] = lambda is_new: None,
    ) -> None:
        """`track(is_new)` starts to send to trackers, if there are any; it is told whether metrics.jsonl is new."""
        self.settings, self.early_warnings, self._track = settings, early_warnings, track
        self.stage = settings.stage.name
        self._tracking: Tracking | None = None
        self._file: TextIO | None = None
        self._bar: tqdm | None = None
        self._first_time = time.monotonic()
        self._steps_before = 0

    def step(self, record: Step) -> None:
        """Write a training step, and the warnings that follow from it."""
        self._append(record, before_iteration=record["iteration"])
        _write_to_tensorboard(record, with_layers=record["iteration"] % self.settings.log_interval == 0)
        self._show_progress(record, self.settings.last_step, self.settings.log_interval)
        self.warn(record["iteration"], self.early_warnings.step(record))

    def validation(self, iteration: int, results: dict[str, HeldOutLoss]) -> None:
        """Write a validation pass (language -> loss), and the warnings that follow from it."""
        event = ValidationEvent(iteration=iteration, event="validation", stage=self.stage, languages=results)
        self._append(event, before_iteration=iteration + 1)
        shown = []
        for language, result in results.items():
            unit, value = bits_of(result)
            shown.append(f"{language} {'NaN' if value is None else f'{value:.4f}'} {unit}")
            if value is not None:
                tag = f"validation {unit}/{language}"
                if (writer := get_tensorboard_writer()) is not None:
                    writer.add_scalar(tag, value, iteration)
        self.print(f"{self.stage} step {iteration}, validation: {', '.join(shown)}")
        self.warn(iteration, self.early_warnings.validation(event))

    def warn(self, iteration: int, warnings: list[EarlyWarning]) -> None:
        """Write warnings, which also appear on stderr."""
        for warning in warnings:
            event = WarningEvent(
                iteration=iteration, event="warning", stage=self.stage, kind=warning.kind, message=warning.message
            )
            self._append(event, before_iteration=iteration + 1)
            self.print(f"moelpr: warning: {self.stage} step {iteration}: {warning.message}")

    def print(self, line: str) -> None:
        """Print a line on stderr, above the progress bar if there is one."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        if (writer := get_tensorboard_writer()) is not None:
            writer.flush()  # Megatron does before the last validation, and a thread of the writer may not get to it
        for output in (self._file, self._bar, self._tracking):
            if output is not None:
                output.close()

    def _append(self, record: Any, before_iteration: int) -> None:
        if (save := self.settings.save) is not None and self._file is None:
            save.mkdir(parents=True, exist_ok=True)
            is_new = not (save / METRICS_FILE).exists()
            self._file = open_metrics(save / METRICS_FILE, before_iteration, self.early_warnings.remember)
            if (tracking := self._track(is_new)) is not None:
                self._tracking = tracking
                _share_scalars(tracking)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._tracking is not None:
            self._tracking.add(record["iteration"], values_of(record))
            self._tracking.flush()

    def _show_progress(self, record: Step, total: int, log_interval: int) -> None:
        """In addition to Megatron's log: a bar with the time left on a terminal, else a line per log interval."""
        if self._bar is None:
            self._steps_before, self._first_time = record["iteration"] - 1, time.monotonic() - record[STEP_TIME_S]
            settings = {"desc": self.stage, "unit": "step", "dynamic_ncols": True, "disable": None}
            self._bar = tqdm(total=total, initial=self._steps_before, **settings)
        shown = {m.label: f"{record[m]:.4g}" for m in METRICS if m.in_progress and record.get(m) is not None}
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
        elif record["iteration"] % log_interval == 0 or record["iteration"] == total:
            steps = record["iteration"] - self._steps_before
            left_s = (time.monotonic() - self._first_time) / steps * (total - record["iteration"])
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = tqdm.format_interval(left_s)
            print(f"{self.stage} {record['iteration']}/{total}  {values}  {left} left", file=sys.stderr, flush=True)


@contextmanager
def report_nonfinite_exit(run_log: RunLog, args: argparse.Namespace) -> Iterator[None]:
    """If a gradient is NaN or Inf, for which Megatron raises a RuntimeError, log the step and its fix, and exit with 1.

    Megatron checks each rank's gradients before they are added up, so perhaps only some ranks find it.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if "Unexpected result" not in str(error) or args.debug:
            raise
    step = args.curr_iteration + 1
    message = (
        f"the gradients of step {step} are NaN/Inf; the run stops before they change a weight, and its last checkpoint "
        "stays; lower --lr, raise --lr-warmup-iters, or leave this step's data out with "
        f"--iterations-to-skip {step}"
    )
    if ranks.is_last_rank():
        run_log.warn(step, [EarlyWarning("not_a_number", message)])
    else:
        print(f"moelpr: error: rank {ranks.rank()}: {message}", file=sys.stderr, flush=True)
        time.sleep(5)  # the launcher ends all ranks as soon as one has failed, but the last one may still be writing
    sys.exit(1)


def open_metrics(path: Path, before_iteration: int, remember: Callable[[Any], None] = lambda record: None) -> TextIO:
    """Open metrics.jsonl for appending, without the records of steps that a resumed run is about to repeat.

    `remember` is called with every step and event that stays.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, but the run's metrics are written to a file of this name; move it away")
    if path.exists():
        kept, parser = [], LineParser()
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = parser.parse(line)
            except ValueError:
                if number < len(lines):  # else the incomplete line of a killed run
                    print(f"moelpr: warning: {path}, line {number} is damaged and left out", file=sys.stderr)
                continue
            if record["iteration"] >= before_iteration:
                break
            remember(record)
            kept.append(line.decode() + "\n")
        write_text(path, "".join(kept))
    return open(path, "a")


def _write_to_tensorboard(record: Step, with_layers: bool) -> None:
    """Write the scalars that Megatron does not; with `with_layers` also per layer, hundreds for a large model."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    for metric in METRICS:
        if metric.tag and record.get(metric) is not None and (with_layers or not metric.axes):
            for index, value in np.ndenumerate(np.array(record[metric], dtype=float)):
                if not math.isnan(value):
                    writer.add_scalar(metric.tag.format(*index), value, record["iteration"])


def _share_scalars(tracking: Tracking) -> None:
    """Have trackers get what Megatron writes to TensorBoard, such as --log-params-norm, without layers and samples."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    write, ours = writer.add_scalar, {metric.tracked for metric in METRICS}

    def add_scalar(tag: str, value: Any, step: int, *more: Any, **options: Any) -> None:
        write(tag, value, step, *more, **options)
        if not (tag in ours or "layer" in tag or " vs " in tag or tag.startswith("validation ")):
            tracking.add(step, {tag: float(value)})

    writer.add_scalar = add_scalar


def finite(value: Any) -> float | None:
    """A plain float; None for None, and for NaN (a mean over no tokens) and Inf, which JSON does not support."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None
