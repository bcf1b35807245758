"""A view of a run that follows its metrics.jsonl: drawn on a terminal, or one line per record in a file or pipe.

It only reads, so it can start and stop while the run trains, on any machine that sees the run's folder.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from moelpr.report.runs import Run, read_run
from moelpr.run_folder import FINISHED_FILE, METRICS_FILE
from moelpr.run_metrics import Record

_BARS = "▁▂▃▄▅▆▇█"
_VALUES = {
    "loss": "lm_loss", "loss, original": "lm_loss_original", "loss, expanded": "lm_loss_expanded",
    "balance": "balance_loss", "LPR": "lpr_loss", "grad norm": "grad_norm", "tokens/s": "tokens_per_s",
    "memory, GiB": "peak_memory_gib",
}  # fmt: skip
_KEPT = 2000  # steps in the sparklines at most


def show(folder: Path, interval_s: float, once: bool) -> None:
    """Follow the run in `folder` until it is finished or Ctrl-C is pressed.

    Args:
        once: show the current state and return.

    Raises:
        UserError: the folder has no metrics.jsonl, or a damaged one.
    """
    console = Console()
    if once:
        console.print(View(read_run(folder)).drawing())
        return
    drawn = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    view: View | None = None
    with suppress(KeyboardInterrupt), drawn as live:  # Ctrl-C is the usual way to leave
        for run, records in follow(folder, interval_s):
            if view is None and not live:
                print(View(run).headline(), flush=True)
            view = view if view and view.run is run else View(run)
            for record in records:
                view.add(record)
                if not live:
                    print(line(record), flush=True)
            if live:
                live.update(view.drawing(), refresh=True)


class View:
    """What is known of a run, from its start to its newest record."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recent = deque(run.metrics.steps, _KEPT)
        self.validations = run.metrics.validations[:1] + run.metrics.validations[1:][-1:]  # the first and the newest
        self.warnings = deque(run.metrics.warnings, 5)

    def add(self, record: Record) -> None:
        event = record.get("event")
        if event == "warning" and record not in self.warnings:
            self.warnings.append(record)
        elif event == "validation":
            self.validations = [*self.validations[:1], record]
        elif event is None and record["iteration"] > self.last.get("iteration", 0):
            self.recent.append(record)

    @property
    def last(self) -> Record:
        return self.recent[-1] if self.recent else {}

    def headline(self) -> str:
        step, total = self.last.get("iteration", 0), self.run.num_steps
        parts = [f"{self.run.folder}", str(self.last.get("stage", self.run.stage)), f"step {step:,}"]
        if total:
            parts[-1] += f" of {total:,} ({step / total:.0%})"
            times = [record["step_time_s"] for record in self.recent if record.get("step_time_s")][-50:]
            if times and step < total:
                parts.append(f"{timedelta(seconds=int((total - step) * sum(times) / len(times)))} left")
        return "  ".join(parts)

    def drawing(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self.headline(), style="bold"), self._values()]
        if self.validations:
            parts.append(self._languages())
        for record in self.warnings:
            # The word "warning" is there because color alone would not do.
            parts.append(Text(f"warning, step {record['iteration']:,}: {record.get('message', '')}", style="yellow"))
        return Group(*parts)

    def _values(self) -> Table:
        table = _table("", "now", "history")
        table.columns[2].justify = "left"
        for name, key in _VALUES.items():
            values = [record[key] for record in self.recent if record.get(key) is not None]
            if values:
                now = f"{values[-1]:.4g}" if values[-1] < 1e4 else f"{values[-1]:,.0f}"
                table.add_row(name, now, sparkline(values))
        return table

    def _languages(self) -> Table:
        first, newest = self.validations[0], self.validations[-1]
        table = _table(f"held out, step {newest['iteration']:,}", "", f"since step {first['iteration']:,}")
        for language, result in newest["languages"].items():
            for unit, value in _bits(result)[:1]:
                start = first["languages"].get(language, {}).get(unit)
                change = f"{value / start - 1:+.1%}" if start else ""
                table.add_row(f"{language} ({result.get('group')})", f"{value:.3f} {unit.replace('_', ' ')}", change)
        return table


def _table(name: str, *numbers: str) -> Table:
    columns = [Column(number, justify="right", no_wrap=True) for number in numbers]
    return Table(Column(name, no_wrap=True), *columns, box=None, pad_edge=False, header_style="dim")


def _bits(result: Record) -> list[tuple[str, float]]:
    """(unit, value) of one language's held-out text, bits per byte first."""
    return [(unit, result[unit]) for unit in ("bits_per_byte", "bits_per_token") if result.get(unit) is not None]


def sparkline(values: list[float], width: int = 40) -> str:
    """Means of neighbors as bars from the lowest to the highest."""
    size = math.ceil(len(values) / width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def line(record: Record) -> str:
    """A record as one line of a log."""
    where = f"{record.get('stage', 'training')} step {record['iteration']}"
    if record.get("event") == "warning":
        return f"{where}, warning: {record.get('message', '')}"
    if record.get("event") == "validation":
        parts = [
            f"{language} {value:.4f} {unit.replace('_', ' ')}"
            for language, result in record["languages"].items()
            for unit, value in _bits(result)
        ]
        return f"{where}, validation: {', '.join(parts)}"
    parts = [f"{name} {record[key]:.4g}" for name, key in _VALUES.items() if record.get(key) is not None]
    return f"{where}: {', '.join(parts)}"


def follow(folder: Path, interval_s: float) -> Iterator[tuple[Run, list[Record]]]:
    """The run and its new records, possibly none, every `interval_s` seconds until the run is finished.

    A resumed run replaces its metrics.jsonl; then the run is read again. The first records after reading may be
    contained in the run already, but none is missed.
    """
    path = folder / METRICS_FILE
    while True:
        size = path.stat().st_size if path.exists() else 0
        run = read_run(folder)
        with path.open("rb") as file:
            near_end = max(0, size - (1 << 20))
            file.seek(near_end)
            file.seek(near_end + file.read(size - near_end).rfind(b"\n") + 1)  # where a half-written line begins
            while path.stat().st_ino == os.fstat(file.fileno()).st_ino and path.stat().st_size >= file.tell():
                is_finished = (folder / FINISHED_FILE).exists()  # before reading, so that the last records are read
                yield run, list(_new_records(file))
                if is_finished:
                    return
                time.sleep(interval_s)


def _new_records(file: BinaryIO) -> Iterator[Record]:
    while (text := file.readline()).endswith(b"\n"):
        with suppress(ValueError):
            record = json.loads(text)
            if isinstance(record, dict) and "iteration" in record:
                yield record
    file.seek(-len(text), os.SEEK_CUR)  # still being written
