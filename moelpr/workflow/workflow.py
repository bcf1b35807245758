"""Run a chain of commands: each is printed, logged, skipped once done, and done again when what it reads has changed.

A workflow has a folder. A task that has run has a log, `logs/TASK.log`, and a mark, `logs/TASK.json`: its command, the
IDs of the outputs and the checksums of the files that it was made from, and an ID of its own. It is done while all of
these are as they were. An output that was removed is made again only when a task that is not done reads it, or no task
does, so that large intermediate ones can be removed.
"""

import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from moelpr.process import machine
from moelpr.process.errors import MachineError, UserError
from moelpr.process.text_tables import table_text
from moelpr.store.files import make_folder
from moelpr.workflow.execution import execute, interpreter
from moelpr.workflow.mark import Mark, mark_of, relative, shown
from moelpr.workflow.task import Task

Failure = UserError | MachineError
_QUIET = {"PYTHONWARNINGS": "ignore"}


class Workflow:
    """A folder, and the tasks that are done in it."""

    def __init__(self, folder: Path, tasks: Iterable[Task]) -> None:
        """`tasks`: All tasks in an order in which they can run, also those that `run` is not asked for."""
        self.folder, self.logs = folder, folder / "logs"
        self.tasks = {task.name: task for task in tasks}
        self._started = time.monotonic()
        self._printing = threading.Lock()
        self._locks = {name: threading.Lock() for name in self.tasks}

    def run(self, tasks: Iterable[Task] | None = None, *, workers: int = 1, keep_going: bool = False) -> list[Failure]:
        """Run tasks in order, unless they are done.

        Args:
            tasks: By default all. What they read of other tasks is restored if it was removed.
            workers: Number of tasks that run at the same time.
            keep_going: After a failure, go on with what does not depend on the failed task.

        Returns:
            What has failed; [] without `keep_going`.

        Raises:
            UserError: A command failed, did not write its output, or would continue another command's.
            MachineError: A command ended with exit code 1, for instance because the disk is full.
        """
        waiting = [*(self.tasks.values() if tasks is None else tasks)]
        read = {name for task in waiting for name in task.inputs}
        running: dict[Future[None], Task] = {}
        left_out: set[str] = set()
        failures: list[Failure] = []
        with ThreadPoolExecutor(workers) as pool:
            while waiting or running:
                unfinished = {task.name for task in (*waiting, *running.values())}
                ready = [task for task in waiting if not unfinished & {*task.inputs}]
                assert ready or running, "tasks read each other's output"
                for task in ready[: workers - len(running)]:
                    waiting.remove(task)
                    if missing := left_out & {*task.made_from}:
                        left_out.add(task.name)
                        self._print(f"{task.name}: left out, because it reads {', '.join(sorted(missing))}")
                    else:
                        running[pool.submit(self._perform, task, needs_output=task.name not in read)] = task
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    try:
                        future.result()
                    except (UserError, MachineError) as error:
                        if not keep_going:
                            raise
                        self._print(str(error))
                        failures.append(error)
                        left_out.add(task.name)
        return failures

    def is_done(self, name: str) -> bool:
        """Whether a task has succeeded once, whatever has changed since."""
        mark = self._mark(name)
        return mark is not None and mark.wall_s is not None

    def wall_times_s(self) -> dict[str, float]:
        """Seconds of each task that is done, in the order in which they ended."""
        marks = sorted(self.logs.glob("*.json"), key=lambda path: path.stat().st_mtime)
        found = {path.stem: self._mark(path.stem) for path in marks}
        return {name: mark.wall_s for name, mark in found.items() if mark and mark.wall_s is not None}

    def listing(self, tasks: Sequence[Task]) -> str:
        """A table of tasks with their times, and the time that is left."""
        done = self.wall_times_s()
        rows = []
        for task in tasks:
            minutes = done.get(task.name, task.minutes * 60) / 60
            rows.append([task.name, "done" if task.name in done else "", f"{minutes:.0f} min"])
        table = table_text(["task", "state", "took, or expected"], rows, text_columns=(0, 1))
        left = sum(task.minutes for task in tasks if task.name not in done)
        return f"{table}\n\nleft: about {left / 60:.1f} hours"

    def check_machine(self, tasks: Iterable[Task], *, scale: float, spare_disk_gib: float, remedy: str) -> None:
        """Check that disk and memory can hold what the tasks that are not done need.

        Args:
            scale: What the tasks need, as a multiple of what they state.
            spare_disk_gib: More disk space, while an output replaces another one; also scaled.
            remedy: What the user can do except for freeing space.

        Raises:
            MachineError: They are too small.
        """
        left = [task for task in tasks if not self.is_done(task.name)]
        if not left:
            return
        disk = scale * (sum(task.disk_gib for task in left) + spare_disk_gib) * 2**30
        if (free := shutil.disk_usage(self.folder).free) < disk:
            raise MachineError(
                f"the disk of {self.folder} has {machine.format_bytes(free)} free, and the tasks that are left need "
                f"{machine.format_bytes(disk)}; free space, or {remedy}"
            )
        largest = max(left, key=lambda task: task.memory_gib)
        memory = scale * largest.memory_gib * 2**30
        if (free := machine.free_memory()) < memory:
            raise MachineError(
                f"{machine.format_bytes(free)} of memory are free, and task {largest.name} needs "
                f"{machine.format_bytes(memory)}; use a larger machine, or {remedy}"
            )

    def _perform(self, task: Task, *, needs_output: bool) -> None:
        """Run a task unless it is done.

        Args:
            needs_output: Run it also if only its output is missing.
        """
        with self._locks[task.name]:  # other tasks may restore it at the same time
            try:
                words = task.words()
            except UserError:
                self._restore_inputs(task)
                words = task.words()
            before, now = self._mark(task.name), self._mark_of(task, words)
            change = _change(before, now)
            reason = change if before and before.wall_s is not None else ""
            if reason is None and needs_output and not task.has_output():
                reason = "its output was removed"
            if reason is None:
                self._print(f"{task.name}: already done")
                return
            self._restore_inputs(task)
            if change and task.continues and task.continues.exists():
                raise UserError(
                    f"task {task.name} would continue {task.continues}, but {change} since that was made; remove it to "
                    "make it again, or use another folder"
                )
            self._execute(task, words, now, reason)

    def _restore_inputs(self, task: Task) -> None:
        """Make again what other tasks had made for this one and was removed."""
        for name in task.inputs:
            other = self.tasks.get(name)
            if other and self.is_done(name) and not other.has_output():
                self._perform(other, needs_output=True)

    def _execute(self, task: Task, words: list[str], mark: Mark, reason: str) -> None:
        make_folder(self.logs)
        path, log = self._path(task.name), self.logs / f"{task.name}.log"
        mark.write_file(path)  # if this command fails, another one's output is no longer there
        settings = [f"{key}={value}" for key, value in task.environment.items()]
        line = " ".join([*settings, *map(relative, interpreter(words)), shown(words)])
        self._print(f"{task.name}{reason and f': again, because {reason}'}\n    {line} >>{log}")
        with open(log, "a") as file:
            file.write(f"$ {line}\n")
        start = time.monotonic()
        code = execute(words, log, _QUIET | dict(task.environment))
        if code != 0:
            kind = MachineError if code == 1 else UserError
            raise kind(f"task {task.name} exited with code {code} and the message above; its output is in {log}")
        if not task.is_complete():
            raise UserError(
                f"task {task.name} was stopped before its end (its output is in {log}); run it again to resume"
            )
        replace(mark, wall_s=round(time.monotonic() - start, 1)).write_file(path)

    def _mark_of(self, task: Task, words: list[str]) -> Mark:
        made_from = {name: self._mark(name) for name in task.made_from}
        ids = {name: mark.id if mark and mark.wall_s is not None else None for name, mark in made_from.items()}
        return mark_of(words, ids, task.files)

    def _mark(self, name: str) -> Mark | None:
        """The mark of a task; None if it has none, or a damaged one."""
        try:
            return Mark.read_file(self._path(name))
        except UserError:
            return None

    def _path(self, name: str) -> Path:
        return self.logs / f"{name}.json"

    def _print(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        with self._printing:
            print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


def _change(before: Mark | None, now: Mark) -> str | None:
    """What has changed since a task ran; None if nothing has, or it has never run."""
    if before is None:
        return None
    if before.command != now.command:
        return "its command has changed"
    for name, made in now.made_from.items():
        if before.made_from.get(name) != made:
            return f"{name} was made again"
    for name, checksum in now.files.items():
        if before.files.get(name) != checksum:
            return f"{name} has changed"
    is_same = (before.made_from, before.files) == (now.made_from, now.files)
    return None if is_same else "what it is made from has changed"
