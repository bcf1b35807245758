"""A run's records, and what observes them: metrics.jsonl, TensorBoard, trackers, stderr (a bar or lines), warnings.

A record is a training step or an event (a validation pass or a warning). The last rank writes them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from moelpr.model.metrics.run_metrics import LineParser, Step, WarningEvent, bits_of
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
        # Each sees every record, and may return warnings.
        self.observers: list[Callable[[Any], Sequence[EarlyWarning] | None]] = [
            self._append,
            self._write_to_tensorboard,
            self._show,
            early_warnings.see,
        ]

    def write(self, record: Any) -> None:
        """Write a training step or an event, and the warnings that follow from it."""
        for observe in self.observers:
            self.warn(record["iteration"], observe(record) or ())

    def warn(self, iteration: int, warnings: Sequence[EarlyWarning]) -> None:
        """Write warnings, which also appear on stderr."""
        for kind, message in warnings:
            self.write(WarningEvent(iteration=iteration, event="warning", stage=self.stage, kind=kind, message=message))

    def close(self) -> None:
        if (writer := get_tensorboard_writer()) is not None:
            writer.flush()  # Megatron does before the last validation, and a thread of the writer may not get to it
        for output in (self._file, self._bar, self._tracking):
            if output is not None:
                output.close()

    def _append(self, record: Any) -> None:
        if (save := self.settings.save) is not None and self._file is None:
            save.mkdir(parents=True, exist_ok=True)
            is_new = not (save / METRICS_FILE).exists()
            before_iteration = record["iteration"] + ("event" in record)
            self._file = open_metrics(save / METRICS_FILE, before_iteration, self.early_warnings.see)
            self._tracking = self._track(is_new)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._tracking is not None:
            self._tracking.add(record["iteration"], values_of(record))

    def _write_to_tensorboard(self, record: Any) -> None:
        """Write what Megatron does not; once per log interval also per layer, hundreds of scalars for a large model."""
        writer, iteration = get_tensorboard_writer(), record["iteration"]
        if writer is None:
            return
        for tag, value in values_of(record).items() if "event" in record else ():
            writer.add_scalar(tag, value, iteration)
        with_layers = iteration % self.settings.log_interval == 0
        for metric in METRICS:
            if metric.tag and record.get(metric) is not None and (with_layers or not metric.axes):
                for index, value in np.ndenumerate(np.array(record[metric], dtype=float)):
                    if not math.isnan(value):
                        writer.add_scalar(metric.tag.format(*index), value, iteration)

    def _show(self, record: Any) -> None:
        """Show a record on stderr: an event as a line above the progress bar, if there is one."""
        if "event" not in record:
            return self._show_progress(record)
        line = f"{self.stage} step {record['iteration']}"
        if record["event"] == "validation":
            found = ((language, *bits_of(result)) for language, result in record["languages"].items())
            shown = [f"{name} {'NaN' if bits is None else f'{bits:.4f}'} {unit}" for name, unit, bits in found]
            line += f", validation: {', '.join(shown)}"
        else:
            line = f"moelpr: warning: {line}: {record['message']}"
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def _show_progress(self, record: Step) -> None:
        """In addition to Megatron's log: a bar with the time left on a terminal, else a line per log interval."""
        iteration, total = record["iteration"], self.settings.last_step
        if self._bar is None:
            self._steps_before, self._first_time = iteration - 1, time.monotonic() - record[STEP_TIME_S]
            settings = {"desc": self.stage, "unit": "step", "dynamic_ncols": True, "disable": None}
            self._bar = tqdm(total=total, initial=self._steps_before, **settings)
        values = {m.label: record[m] for m in METRICS if m.label and record.get(m) is not None}
        shown = {name: f"{value:{',.0f' if value >= 1000 else '.4g'}}" for name, value in values.items()}
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
        elif iteration % self.settings.log_interval == 0 or iteration == total:
            left_s = (time.monotonic() - self._first_time) / (iteration - self._steps_before) * (total - iteration)
            line, left = "  ".join(f"{name} {value}" for name, value in shown.items()), tqdm.format_interval(left_s)
            print(f"{self.stage} {iteration}/{total}  {line}  {left} left", file=sys.stderr, flush=True)


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


def open_metrics(path: Path, before_iteration: int, remember: Callable[[Any], Any] = lambda record: None) -> TextIO:
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


def finite(value: Any) -> float | None:
    """A plain float; None for None, and for NaN (a mean over no tokens) and Inf, which JSON does not support."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None
