"""A view of a run that follows its metrics.jsonl: drawn on a terminal, or one line per record in a file or pipe.

It only reads, so it can start and stop while the run trains, on any machine that sees the run's folder.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from moelpr.base.errors import UserError, printable
from moelpr.base.run_folder import FINISHED_FILE, METRICS_FILE
from moelpr.measure.report.runs import Run, read_run
from moelpr.model.metrics.run_metrics import LineParser, bits_of
from moelpr.model.metrics.schema import METRICS

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = [metric for metric in METRICS if metric.label]
_KEPT = 2000  # steps in the sparklines at most


def show(folder: Path, interval_s: float, once: bool) -> None:
    """Follow the run in `folder` until it is finished or Ctrl-C is pressed; with `once`, show its state and return."""
    console = Console()
    if once:
        console.print(drawing(read_run(folder)))
        return
    drawn = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    is_first = True
    with suppress(KeyboardInterrupt), drawn as live:  # Ctrl-C is the usual way to leave
        for run, records in follow(folder, interval_s):
            if is_first and not live:
                print(headline(run), flush=True)
            is_first = False
            for record in records:
                add(run, record)
                if not live:
                    print(printable(line(record)), flush=True)
            if live:
                live.update(drawing(run), refresh=True)


def add(run: Run, record: Any) -> None:
    """Add a record to the run unless it is there; without numbers per layer, which the view does not show."""
    metrics, event = run.metrics, record.get("event")
    if event == "warning" and record not in metrics.warnings:
        metrics.warnings.append(record)
    elif event == "validation":
        metrics.validations.append(record)
    elif event is None and record["iteration"] > run.step:
        metrics.steps.append({name: value for name, value in record.items() if not isinstance(value, list)})


def headline(run: Run) -> str:
    """Folder, stage, step and time left."""
    done = f" ({run.step / run.num_steps:.0%})" if run.num_steps else ""
    parts = [f"{run.folder}", run.stage, f"step {run.progress}{done}"]
    if run.time_left_s:
        parts.append(f"{timedelta(seconds=int(run.time_left_s))} left")
    return printable("  ".join(parts))


def drawing(run: Run) -> RenderableType:
    """Headline, values with their history, held-out languages and the last warnings."""
    values = _table("", "now", "history")
    for metric in _SHOWN:
        history = [step[metric] for step in run.metrics.steps[-_KEPT:] if step.get(metric) is not None]
        if history:
            now = f"{history[-1]:.4g}" if history[-1] < 1e4 else f"{history[-1]:,.0f}"
            values.add_row(metric.label, now, sparkline(history))
    parts: list[RenderableType] = [Text(headline(run), style="bold"), values]
    if run.metrics.validations:
        first, newest = run.metrics.validations[0], run.metrics.validations[-1]
        table = _table(f"held out, step {newest['iteration']:,}", "", f"since step {first['iteration']:,}")
        for language, loss in newest["languages"].items():
            unit, value = bits_of(loss)
            if value is not None:
                start_unit, start = bits_of(first["languages"].get(language, {}))
                change = f"{value / start - 1:+.1%}" if start and start_unit == unit else ""
                table.add_row(Text(printable(f"{language} ({loss.get('group')})")), f"{value:.3f} {unit}", change)
        parts.append(table)
    for warning in run.metrics.warnings[-5:]:
        message = printable(str(warning.get("message", "")))
        # The word "warning" is there because color alone would not do.
        parts.append(Text(f"warning, step {warning['iteration']:,}: {message}", style="yellow"))
    return Group(*parts)


def _table(name: str, *numbers: str) -> Table:
    columns = [Column(number, justify="right", no_wrap=True) for number in numbers]
    return Table(Column(name, no_wrap=True), *columns, box=None, pad_edge=False, header_style="dim")


def sparkline(values: list[float]) -> str:
    """Means of neighbors as at most 40 bars from the lowest to the highest."""
    size = math.ceil(len(values) / 40)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def line(record: Any) -> str:
    """A record as one line of a log."""
    where = f"{record.get('stage', 'training')} step {record['iteration']}"
    if record.get("event") == "warning":
        return f"{where}, warning: {record.get('message', '')}"
    if record.get("event") == "validation":
        bits = {language: bits_of(loss) for language, loss in record["languages"].items()}
        parts = [f"{language} {value:.4f} {unit}" for language, (unit, value) in bits.items() if value is not None]
        return f"{where}, validation: {', '.join(parts)}"
    return f"{where}: {', '.join(f'{m.label} {record[m]:.4g}' for m in _SHOWN if record.get(m) is not None)}"


def follow(folder: Path, interval_s: float) -> Iterator[tuple[Run, list[Any]]]:
    """The run and its new records, possibly none, every `interval_s` seconds until the run is finished.

    A resumed run replaces its metrics.jsonl; then the run is read again. The first records after reading may be
    contained in the run already, but none is missed.

    Raises:
        UserError: the run folder is removed meanwhile.
    """
    path = folder / METRICS_FILE
    try:
        while True:
            size = path.stat().st_size if path.exists() else 0
            run, parser = read_run(folder), LineParser()
            with path.open("rb") as file:
                near_end = max(0, size - (1 << 20))
                file.seek(near_end)
                file.seek(near_end + file.read(size - near_end).rfind(b"\n") + 1)  # where a half-written line begins
                while path.stat().st_ino == os.fstat(file.fileno()).st_ino and path.stat().st_size >= file.tell():
                    is_finished = (folder / FINISHED_FILE).exists()  # before reading, so that the last records are read
                    yield run, list(_new_records(file, parser))
                    if is_finished:
                        return
                    time.sleep(interval_s)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no longer there; pass a folder of a run") from error


def _new_records(file: BinaryIO, parser: LineParser) -> Iterator[Any]:
    while (text := file.readline()).endswith(b"\n"):
        with suppress(ValueError):
            yield parser.parse(text)
    file.seek(-len(text), os.SEEK_CUR)  # still being written
