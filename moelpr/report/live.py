"""A view of a run that follows its metrics.jsonl: drawn on a terminal, also over ssh, or plain lines in a file or pipe.

It only reads, so it can come and go while the run goes on, on any machine that sees the run's folder.
"""

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moelpr.errors import UserError
from moelpr.report.runs import Run, read_run
from moelpr.run_folder import FINISHED_FILE, METRICS_FILE
from moelpr.run_metrics import Record

_BARS = "▁▂▃▄▅▆▇█"
_VALUES = {
    "loss": "lm_loss",
    "loss, original": "lm_loss_original",
    "loss, expanded": "lm_loss_expanded",
    "balance": "balance_loss",
    "LPR": "lpr_loss",
    "grad norm": "grad_norm",
    "tokens/s": "tokens_per_s",
    "memory, GiB": "peak_memory_gib",
}
_KEPT = 2000  # steps that the sparklines show at most


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.report live",
        description="Follow a run until it is finished; Ctrl-C leaves, the run goes on.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that --save named")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="show how it stands now, and end")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if not args.interval > 0:
        raise UserError(f"--interval {args.interval:g} must be above 0")
    position, run = _read(args.run)
    console = Console()
    try:
        if args.once:
            console.print(View(run).drawing())
        elif console.is_terminal:
            _draw(run, position, console, args.interval)
        else:
            _write_lines(run, position, args.interval)
    except KeyboardInterrupt:
        pass  # the usual way to leave


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
        words = [f"{self.run.folder}", str(self.last.get("stage", self.run.stage)), f"step {step:,}"]
        if total:
            words[-1] += f" of {total:,} ({step / total:.0%})"
            times = [record["step_time_s"] for record in self.recent if record.get("step_time_s")][-50:]
            if times and step < total:
                words.append(f"{_clock((total - step) * sum(times) / len(times))} left")
        return "  ".join(words)

    def drawing(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self.headline(), style="bold"), self._values()]
        if self.validations:
            parts.append(self._languages())
        for record in self.warnings:
            # Said in words too, so that the colour is not needed.
            parts.append(Text(f"warning, step {record['iteration']:,}: {record.get('message', '')}", style="yellow"))
        return Group(*parts)

    def _values(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, justify in (("", "left"), ("now", "right"), ("course", "left")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name, key in _VALUES.items():
            values = [record[key] for record in self.recent if record.get(key) is not None]
            if values:
                table.add_row(
                    name, f"{values[-1]:.4g}" if values[-1] < 1e4 else f"{values[-1]:,.0f}", sparkline(values)
                )
        return table

    def _languages(self) -> Table:
        first, newest = self.validations[0], self.validations[-1]
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(f"held out, step {newest['iteration']:,}")
        table.add_column("", justify="right")
        table.add_column(f"since step {first['iteration']:,}", justify="right")
        for language, result in newest["languages"].items():
            unit = "bits_per_byte" if result.get("bits_per_byte") is not None else "bits_per_token"
            value, start = result.get(unit), first["languages"].get(language, {}).get(unit)
            if value is not None:
                change = f"{value / start - 1:+.1%}" if start else ""
                table.add_row(f"{language} ({result.get('group')})", f"{value:.3f} {unit.replace('_', ' ')}", change)
        return table


def sparkline(values: list[float], width: int = 40) -> str:
    """Means of neighbours as bars from the lowest to the highest."""
    size = math.ceil(len(values) / width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def line(record: Record) -> str:
    """A record as a line of a log."""
    where = f"{record.get('stage', 'training')} step {record['iteration']}"
    if record.get("event") == "warning":
        return f"{where}, warning: {record.get('message', '')}"
    if record.get("event") == "validation":
        words = [
            f"{language} {value:.4f} {unit.replace('_', ' ')}"
            for language, result in record["languages"].items()
            for unit in ("bits_per_byte", "bits_per_token")
            if (value := result.get(unit)) is not None
        ]
        return f"{where}, validation: {', '.join(words)}"
    words = [f"{name} {record[key]:.4g}" for name, key in _VALUES.items() if record.get(key) is not None]
    return f"{where}: {', '.join(words)}"


def _read(folder: Path) -> tuple[int, Run]:
    """The run, and where its file ended before it was read: what follows may be known already, but none is missed."""
    metrics_file = folder / METRICS_FILE
    position = metrics_file.stat().st_size if metrics_file.exists() else 0
    return position, read_run(folder)


def follow(run: Run, position: int, interval_s: float) -> Iterator[list[Record]]:
    """Records after `position` bytes, as they come, none where there are none, until the run is finished."""
    path = run.folder / METRICS_FILE
    with path.open("rb") as file:
        file.seek(_after_last_line(file, position))
        while True:
            is_finished = (run.folder / FINISHED_FILE).exists()  # looked for first: what came before it is read below
            if path.stat().st_ino != _inode(file) or path.stat().st_size < file.tell():
                return  # a resumed run has written the file anew
            yield list(_new_records(file))
            if is_finished:
                return
            time.sleep(interval_s)


def _after_last_line(file: Any, size: int) -> int:
    """Where the half-written last line begins, or the end."""
    start = max(0, size - (1 << 20))
    file.seek(start)
    return start + file.read(size - start).rfind(b"\n") + 1


def _new_records(file: Any) -> Iterator[Record]:
    while True:
        start = file.tell()
        text = file.readline()
        if not text.endswith(b"\n"):
            file.seek(start)  # still being written
            return
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict) and "iteration" in record:
            yield record


def _inode(file: Any) -> int:
    return os.fstat(file.fileno()).st_ino


def _draw(run: Run, position: int, console: Console, interval_s: float) -> None:
    with Live(View(run).drawing(), console=console, auto_refresh=False) as live:
        while True:
            view = View(run)
            for records in follow(run, position, interval_s):
                for record in records:
                    view.add(record)
                live.update(view.drawing(), refresh=True)
            if (run.folder / FINISHED_FILE).exists():
                return
            position, run = _read(run.folder)


def _write_lines(run: Run, position: int, interval_s: float) -> None:
    print(View(run).headline(), flush=True)
    while True:
        for records in follow(run, position, interval_s):
            for record in records:
                print(line(record), flush=True)
        if (run.folder / FINISHED_FILE).exists():
            return
        position, run = _read(run.folder)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
