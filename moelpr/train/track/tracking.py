"""One run in trackers for a whole pipeline: its ID, its steps, which never restart, and the threads that send them.

metrics.jsonl is the log; trackers get copies of it. Whoever starts to send asks a tracker which steps it has and sends
what it lacks, of earlier stages too, so that neither a kill nor a tracker that was away leaves a gap or a step twice.
"""

import argparse
import os
import queue
import re
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from moelpr.base.errors import UserError, first_line
from moelpr.base.records import STRICT, Record
from moelpr.base.run_folder import METRICS_FILE, read_settings
from moelpr.model.metrics.run_metrics import bits_of, mean_of, read_records
from moelpr.model.metrics.schema import LM_LOSS, METRICS
from moelpr.train.track.trackers import Tracker, make_trackers, public_settings, redact

# A run that is asked to stop may be killed soon.
_RETRY_S, _CLOSE_S = 60.0, 10.0
# Step of the whole run → values.
Values = tuple[int, dict[str, float]]


@dataclass(frozen=True, config=STRICT)
class TrackedRun(Record):
    """A run in trackers, to which one or several stages log.

    Attributes:
        run: Its ID there.
        starts: Run folder, relative to that of the file → the number of steps before its first one.
    """

    FILE_NAME: ClassVar[str] = "tracker.json"
    REMEDY: ClassVar[str] = "remove it, and another run is made"

    run: str
    starts: dict[str, int]

    @classmethod
    def join(
        cls, file: Path, save: Path, before: Path | None = None, steps_before: int = 0, *, is_new: bool = False
    ) -> "TrackedRun":
        """Add a run folder to the record, which is made if it is missing.

        Args:
            is_new: Whether the run folder has never had metrics.
            before: The folder of the stage before, if there is one.
            steps_before: The steps of that stage.
        """
        tracked = cls.read_file(file) if file.is_file() else cls("", {})
        own = os.path.relpath(save, file.parent)
        if own in tracked.starts and is_new:
            # It is trained again: in a run of its own with the stages before it, which have not changed.
            tracked = cls("", {name: start for name, start in tracked.starts.items() if start < tracked.starts[own]})
        if not tracked.run:
            name = re.sub(r"[^\w.-]+", "-", file.resolve().parent.name)
            tracked = replace(tracked, run=f"{name}-{uuid.uuid4().hex[:8]}")
        if own not in tracked.starts:
            theirs = cls.read_if_there(before) if before else None
            start = theirs.starts.get(".", 0) if theirs else 0
            if before:
                start = tracked.starts.get(os.path.relpath(before, file.parent), start)
            tracked = replace(tracked, starts=tracked.starts | {own: start + steps_before})
            tracked.write_file(file)
        return tracked

    def values(self, folder: Path, sent: Mapping[str, int]) -> Iterator[Values]:
        """The values in metrics.jsonl of all run folders, without stages that a tracker has whole.

        `folder` is that of the record, and `sent` maps a metric to the last step that the tracker has.
        """
        starts = sorted(self.starts.items(), key=lambda item: item[1])
        for (name, start), (_, end) in pairwise([*starts, ("", sys.maxsize)]):
            path = folder / name / METRICS_FILE
            if path.is_file() and sent[LM_LOSS.tracked] < end:
                yield from ((start + record["iteration"], values_of(record)) for record in read_records(path))


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Tracker values of a record in metrics.jsonl; per-layer metrics are averaged."""
    if record.get("event") == "validation":
        units = {language: bits_of(result) for language, result in record["languages"].items()}
        return {f"validation {unit}/{language}": bits for language, (unit, bits) in units.items() if bits is not None}
    if "event" in record:
        return {}
    means = {m.tracked: mean_of(record.get(m)) for m in METRICS if m.tracked}
    values = {name: float(value) for name, value in means.items() if value is not None}
    return values | {f"{record.get('stage', 'run')}/step": float(record["iteration"])}


class Tracking:
    """The clients of a training's trackers, each in a thread, so that the training waits for none of them."""

    def __init__(
        self, args: argparse.Namespace, save: Path, before: Path | None, steps_before: int, *, is_new: bool
    ) -> None:
        """`args`: the flags about trackers; the others are those of `TrackedRun.join`."""
        self._file = Path(args.tracker_run or save / TrackedRun.FILE_NAME)
        self._run = TrackedRun.join(self._file, save, before, steps_before, is_new=is_new)
        self._start = self._run.starts[os.path.relpath(save, self._file.parent)]
        trackers = make_trackers(args, self._run.run, self._file.parent)
        self._senders = [Sender(tracker, self._run, self._file.parent) for tracker in trackers]
        for sender in self._senders:
            sender.start()

    def add(self, iteration: int, values: Mapping[str, float]) -> None:
        """Send values of a step of this stage."""
        for sender in self._senders:
            sender.items.put((self._start + iteration, dict(values)))

    def close(self) -> None:
        for sender in self._senders:
            sender.close()


class Sender(threading.Thread):
    """Sends values to one tracker; after a failure, all again that the tracker lacks."""

    def __init__(self, tracker: Tracker, run: TrackedRun, folder: Path) -> None:
        super().__init__(daemon=True, name=f"send to {tracker.name}")
        self.items: queue.Queue[Values | None] = queue.Queue()
        self._tracker, self._run, self._folder = tracker, run, folder
        self._has_warned, self._is_closing = False, threading.Event()

    def run(self) -> None:
        while True:
            try:
                sent = send_backlog(self._tracker, self._run, self._folder)
                for step, values in iter(self.items.get, None):
                    _send(self._tracker, sent, step, values)
                return self._tracker.finish()
            except Exception as error:  # a client has errors of many kinds
                self._warn(redact(first_line(error)))
            if self._is_closing.wait(_RETRY_S):
                return

    def close(self) -> None:
        """Send what is left, for a limited time."""
        self.items.put(None)
        self._is_closing.set()
        self.join(_CLOSE_S)
        if self.is_alive():
            self._warn(f"it takes more than {_CLOSE_S:.0f} s")

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            line = (
                f"moelpr: warning: {self._tracker.name} gets no metrics ({why}); training goes on, and what is missing "
                "is sent when it answers, by the next start, or by moelpr track"
            )
            print(line, file=sys.stderr, flush=True)


def send_backlog(tracker: Tracker, run: TrackedRun, folder: Path) -> dict[str, int]:
    """Open the run in a tracker, and send settings and values that it lacks; returns metric → last step that it has."""
    sent: Any = tracker.start()
    for name in run.starts:
        if settings := read_settings(folder / name):
            tracker.settings(settings.get("stage", name), public_settings(settings))
    for step, values in run.values(folder, sent):
        _send(tracker, sent, step, values)
    return sent


def _send(tracker: Tracker, sent: dict[str, int], step: int, values: Mapping[str, float]) -> None:
    if new := {key: value for key, value in values.items() if step > sent[key]}:
        tracker.log(new, step)
        sent |= dict.fromkeys(new, step)


def tracked_folders(folders: list[Path], file: Path) -> TrackedRun:
    """The run that folders, in the order of training, belong to or join; UserError if one has no metrics."""
    if missing := [folder for folder in folders if not (folder / METRICS_FILE).is_file()]:
        raise UserError(f"{missing[0]} has no {METRICS_FILE}; pass run folders, in the order of training")
    run, before, steps = None, None, 0
    for folder in folders:
        run = TrackedRun.join(file, folder, before, steps)
        before, steps = folder, max((record["iteration"] for record in read_records(folder / METRICS_FILE)), default=0)
    return run or TrackedRun.read_file(file)
