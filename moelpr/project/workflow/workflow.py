"""Run a chain of commands: each is printed, logged, skipped once done, and done again when what it reads has changed.

A workflow has a folder. A task that has run has a log, `logs/TASK.log`, and a mark, `logs/TASK.json`: its command, the
IDs of the outputs and the checksums of the files that it was made from, and an ID of its own. It is done while all of
these are as they were. An output that was removed is made again only when a task that is not done reads it, no task
does, or it is a result, so that large intermediate ones can be removed.
"""

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moelpr.base import machine
from moelpr.base.command import STOPPED, stopped_code
from moelpr.base.errors import MachineError, StoppedError, UserError
from moelpr.base.files import LockedError, locked, make_folder, remove
from moelpr.base.machine import format_bytes
from moelpr.base.run_folder import COMMAND_FILE, TRACKER_FILE, saved_step
from moelpr.project.workflow.execution import execute, interpreter, passes_on_stops
from moelpr.project.workflow.mark import Mark, difference, mark_of, relative, shown
from moelpr.project.workflow.task import NOTHING, Task

_QUIET = {"PYTHONWARNINGS": "ignore"}
_TERMINATED = -signal.SIGTERM, 128 + signal.SIGTERM  # exit codes without a handler
_COMMAND_CHANGED = "its command has changed"


@dataclass(frozen=True)
class Outlook:
    """The fate of a task."""

    task: Task
    # whether it is done, has never succeeded, has started and continues, or is done again
    state: Literal["done", "to do", "unfinished", "again"]
    reason: str = ""  # why it is done again
    refusal: str = ""  # why it is not done again: a training would go on from what another command has trained
    # the ID that its output will have; None if results that are to be made again decide its command
    id: str | None = None


class Workflow:
    """A folder, and the tasks that are done in it."""

    def __init__(
        self, folder: Path, tasks: Iterable[Task], *, redo: Iterable[str] = (), check: Callable[[], None] = lambda: None
    ) -> None:
        """Nothing runs yet.

        Args:
            tasks: All tasks in an order in which they can run, also those that `run` is not asked for.
            redo: Names of trainings whose folder is set aside if they have changed, instead of an error.
            check: Called before each task starts; it may raise a UserError.
        """
        self.folder, self.logs = folder, folder / "logs"
        self.tasks = {task.name: task for task in tasks}
        self._redo, self._check = frozenset(redo), check
        self._stops: list[int] = []
        self.started = time.monotonic()

    def run(self, tasks: Iterable[Task] | None = None) -> None:
        """Run tasks in order, unless they are done. After SIGTERM, which a running command gets too, start no more.

        Args:
            tasks: By default all. What they read of other tasks is restored if it was removed.

        Raises:
            UserError: A command failed, did not write its output, or would continue another command's.
            MachineError: A command ended with exit code 1, for instance because the disk is full.
        """
        tasks = [*(self.tasks.values() if tasks is None else tasks)]
        read = {name for task in tasks for name in task.inputs}
        with passes_on_stops() as self._stops:
            for task in tasks:
                self._perform(task, needs_output=task.is_result or task.name not in read)
                if self._stops and task is not tasks[-1]:
                    raise StoppedError(f"stopped by SIGTERM after task {task.name}; run it again to resume")
        if gone := [task.name for task in tasks if task.is_result and not self._has_output(task)]:
            raise MachineError(f"the output of task {gone[0]} is no longer there; run it again")

    def perform(self, name: str, *, is_leader: bool = True) -> None:
        """Do one task on this node of a cluster, as `run` does; its output is printed too.

        Args:
            is_leader: Whether this node keeps the task's record; the others only run its command.

        Raises:
            UserError: A task that it reads is not done.
        """
        task = self.tasks[name]
        for other in task.inputs:
            if other in self.tasks and not self.is_done(other):
                raise UserError(f"task {name} requires {other}, which is not done; run the whole chain")
        with passes_on_stops() as self._stops, _stopped_if(self._stops):
            if is_leader:
                self._perform(task, needs_output=True, on_cluster=True)
            elif (
                self._change(task, task.words())[1] is not None or not self.is_done(name) or not self._has_output(task)
            ):
                log = self.logs / f"{name}.node-{os.uname().nodename}.log"
                self._run_command(task, task.words(), log, echo=True, checks_output=False)

    def adopt(self, name: str, made_as: str) -> None:
        """Record that jobs of a cluster have made a task's output in shards.

        Args:
            made_as: The ID of the output when they were submitted.

        Raises:
            UserError: The task would be another one now, or its output is not there.
        """
        task = self.tasks[name]
        now, _ = self._change(task, task.words())
        if now.id != made_as or not self._has_output(task):
            raise UserError(f"task {name} has changed since its shards were submitted, or one is missing; run it again")
        self.finish(task, now, 0.0)

    def outlook(self) -> list[Outlook]:
        """Tell what `run` would do with each task, and why; start nothing."""
        ids: dict[str, str | None] = {}
        outlooks: list[Outlook] = []
        read = {name for task in self.tasks.values() for name in task.inputs}
        for task in self.tasks.values():
            before, undone = self._mark(task.name), [name for name in task.inputs if ids.get(name, "") is None]
            try:
                now = self._mark_of(task, task.words(), ids)
                reason = _change(before, now)
            except (UserError, MachineError):  # results that decide its command are still to come, or text is gone
                now, reason = None, f"{' and '.join(undone) or 'what decides its command'} will be made again"
                if not undone and (new := [name for name in task.inputs if not self.is_done(name)]):
                    reason = f"{' and '.join(new)} must be done first"
                reason = "text that it reads is gone" if task.missing else reason
            ids[task.name] = now.id if now else None
            if before is None:
                outlook = Outlook(task, "to do")
            elif reason is None and before.wall_s is None:
                outlook = Outlook(task, "unfinished")
            elif reason is None and ((task.name in read and not task.is_result) or self._has_output(task)):
                outlook = Outlook(task, "done")
            else:
                outlook = Outlook(task, "again", reason or "its output was removed", self._refusal(task, reason))
            outlooks.append(replace(outlook, id=ids[task.name]))
        return outlooks

    def outlook_of_jobs(self) -> list[Outlook]:
        """Tell what jobs of a cluster must do: as `outlook`, but removed outputs that they read are made again.

        Raises:
            UserError: A task cannot be done.
        """
        outlooks = {outlook.task.name: outlook for outlook in self.outlook()}
        for outlook in reversed(list(outlooks.values())):
            if refusal := outlooks[outlook.task.name].refusal:
                raise UserError(refusal)
            for name in outlook.task.inputs if outlooks[outlook.task.name].state != "done" else ():
                if outlooks[name].state == "done" and not self._has_output(outlooks[name].task):
                    outlooks[name] = replace(outlooks[name], state="again", reason="its output was removed")
        return list(outlooks.values())

    def tasks_of_jobs(self) -> list[Task]:
        """The tasks that jobs of a cluster must do; print the state of each task."""
        outlooks = self.outlook_of_jobs()
        for outlook in outlooks:
            print(f"{outlook.task.name}: {outlook.state}" + (f", because {outlook.reason}" if outlook.reason else ""))
        return [outlook.task for outlook in outlooks if outlook.state != "done"]

    def check_machine(self) -> None:
        """Check that disk and memory can hold what the tasks that are not done need.

        Raises:
            MachineError: They are too small.
        """
        left = [task for task in self.tasks.values() if not (task.is_spare or self.is_done(task.name))]
        disk = round(sum(task.disk_gib for task in left) * 2**30)
        memory, name = max(((round(task.memory_gib * 2**30), task.name) for task in left), default=(0, ""))
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        if (free := shutil.disk_usage(existing).free) < disk:
            raise MachineError(
                f"the disk of {self.folder} has {format_bytes(free)} free, and the tasks that are left need "
                f"{format_bytes(disk)}; free space, or choose another output folder"
            )
        if (free := machine.free_memory()) < memory:
            raise MachineError(
                f"{format_bytes(free)} of memory are free, and task {name} needs {format_bytes(memory)}; use a larger "
                "machine"
            )

    def set_aside(self) -> None:
        """Set the trainings aside that are done again, before jobs of a cluster start them."""
        for outlook in self.outlook_of_jobs() if self._redo else ():
            if outlook.state == "again" and outlook.task.name in self._redo:
                self._set_aside(outlook.task)

    def is_done(self, name: str) -> bool:
        """Whether a task has succeeded once, whatever has changed since."""
        mark = self._mark(name)
        return mark is not None and mark.wall_s is not None

    def wall_times_s(self) -> dict[str, float]:
        """Seconds of each task that is done."""
        marks = {name: self._mark(name) for name in self.tasks}
        return {name: mark.wall_s for name, mark in marks.items() if mark and mark.wall_s is not None}

    def _perform(self, task: Task, *, needs_output: bool, on_cluster: bool = False) -> None:
        """Run a task unless it is done.

        Args:
            needs_output: Run it also if only its output is missing.
            on_cluster: Other tasks are jobs of their own, so nothing is restored for it.
        """
        with self._alone(task):
            try:
                words = task.words()
            except UserError:
                self._restore_inputs(task)
                words = task.words()
            now, change = self._change(task, words)
            reason = change if self.is_done(task.name) else ""
            if reason is None and needs_output and not self._has_output(task):
                reason = "its output was removed"
            if reason is None:
                self._print(f"{task.name}: already done")
                return
            self._check()
            if not on_cluster:
                self._restore_inputs(task)
            if refusal := self._refusal(task, change):
                raise UserError(refusal)
            if change:
                self._set_aside(task)
                # All of them at once: if this run is stopped, the next one need not be told again.
                for name in self._redo & self.tasks.keys() if task.name in self._redo else ():
                    self._set_aside(self.tasks[name])
            path = self.mark_path(task.name)
            now.write_file(path)  # if this command fails, another one's output is no longer there
            step = saved_step(task.continues) if task.continues else None
            state = (reason and f": again, because {reason}") or (step and f": continues after step {step:,}") or ""
            self._print(f"{task.name}{state}\n    {self.command_line(task)}")
            start = time.monotonic()
            self._run_command(task, words, path.with_suffix(".log"), echo=on_cluster)
            self.finish(task, now, round(time.monotonic() - start, 1))

    def finish(self, task: Task, mark: Mark, wall_s: float) -> None:
        """Record that a task is done."""
        replace(mark, wall_s=wall_s, written=task.written()).write_file(self.mark_path(task.name))

    def _has_output(self, task: Task) -> bool:
        """Whether the output of a task is complete, and all files of its model are as it left them, or edited."""
        mark = self._mark(task.name)
        with suppress(UserError):
            return task.is_complete() and not (mark and {*mark.written} - {*task.written()})
        return False

    @contextmanager
    def _alone(self, task: Task) -> Iterator[None]:
        """Wait for another workflow that makes a shared task, and keep others from making it."""
        make_folder(logs := self._logs(task.name))
        with ExitStack() as stack:
            for attempt in itertools.count() if task.shared else ():
                try:
                    stack.enter_context(locked(logs / f".{task.name}.lock", task.shared or logs, timeout_s=1.0))
                    break
                except LockedError:
                    if self._stops:
                        raise StoppedError(f"stopped by SIGTERM while task {task.name} was waiting") from None
                    if attempt == 0:
                        self._print(f"{task.name}: waiting for another project, which makes it in {task.shared}")
            yield

    def _restore_inputs(self, task: Task) -> None:
        """Make again what other tasks had made for this one and was removed."""
        for name in task.inputs:
            other = self.tasks.get(name)
            if other and self.is_done(name) and not self._has_output(other):
                self._perform(other, needs_output=True)

    def _refusal(self, task: Task, change: str | None) -> str:
        if task.shared and change and change.startswith(_COMMAND_CHANGED) and self.is_done(task.name):
            return (
                f"task {task.name} is shared with other projects, but {change} since one made it; give all of them "
                f"the same text, base and settings of its step, or another folder than {task.shared}"
            )
        if not change or not task.continues or not _has_trained(task.continues) or task.name in self._redo:
            return ""
        return (
            f"task {task.name} would continue {task.continues}, which was made before: {change}; remove it to make it "
            "again, or use another folder"
        )

    def _set_aside(self, task: Task) -> None:
        """Take the unfinished work of another command out of the way, and a training that is to be done again."""
        for folder in task.unfinished:
            remove(folder)
        if task.continues and _has_trained(task.continues):
            number = 1
            while (aside := task.continues.with_name(f"{task.continues.name}.before-{number}")).exists():
                number += 1
            task.continues.rename(aside)
            self._print(f"{task.continues} is now {aside}; remove it if you do not need it")

    def command_line(self, task: Task) -> str:
        """The command of a task as a user would type it, with its environment."""
        if not task.is_needed:
            return "not needed"
        words = [*task.words(), *map(str, task.settings)]
        settings = [f"{key}={value}" for key, value in task.environment.items()]
        python = [] if words[0] == "moelpr" else map(relative, interpreter(words))
        return " ".join([*settings, *python, shown(words)])

    def _run_command(self, task: Task, words: list[str], log: Path, *, echo: bool, checks_output: bool = True) -> None:
        with open(log, "a") as file:
            file.write(f"$ {self.command_line(task)}\n")
        words = [*words, *map(str, task.settings)]
        sys.stdout.flush()
        code = execute(words, log, _QUIET | dict(task.environment), **({"echo": True} if echo else {}))
        is_incomplete = code == 0 and checks_output and not task.is_complete()
        if is_incomplete and not task.continues:
            raise MachineError(f"task {task.name} ended without its output; what it printed is in {log}")
        if code == STOPPED or is_incomplete or (self._stops and code in _TERMINATED):
            # A training that was asked to stop may have exited with 0, because a scheduler's script asks for that.
            is_asked = code in (STOPPED, *_TERMINATED) or stopped_code() == 0
            message = f"task {task.name} was stopped before its end (its output is in {log}); run it again to resume"
            raise StoppedError(message) if is_asked else MachineError(message)
        if code != 0:
            message = f"task {task.name} exited with code {code} and the message above; its output is in {log}"
            raise UserError(message) if code == 2 else MachineError(message)

    def _change(self, task: Task, words: list[str]) -> tuple[Mark, str | None]:
        """The mark that a task would have now, and what has changed since it ran; None if nothing has."""
        now = self._mark_of(task, words, {})
        return now, _change(self._mark(task.name), now)

    def _mark_of(self, task: Task, words: list[str], made: dict[str, str | None]) -> Mark:
        """The mark of a task that would run now; `made` has the IDs of outputs that will be made before."""
        marks = {name: self._mark(name) for name in task.made_from}
        ids = {name: mark.id if mark and mark.wall_s is not None else None for name, mark in marks.items()} | made
        now = mark_of(words, {name: ids[name] for name in marks}, task.files, task.versions)
        if not task.missing:
            return now
        before = self._mark(task.name)
        if before and before.wall_s is not None and (before.command, before.made_from) == (now.command, now.made_from):
            return before
        raise task.missing

    def _mark(self, name: str) -> Mark | None:
        """The mark of a task; None if it has none, a damaged one, or if it was not needed before and is now."""
        with suppress(UserError):
            mark, task = Mark.read_file(self.mark_path(name)), self.tasks.get(name)
            is_needed_now = task is not None and task.is_needed and mark.command == shown(map(str, NOTHING))
            return None if is_needed_now else mark
        return None

    def mark_path(self, name: str) -> Path:
        return self._logs(name) / f"{name}.json"

    def _logs(self, name: str) -> Path:
        task = self.tasks.get(name)
        return task.shared / "logs" if task and task.shared else self.logs

    def _print(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


def _has_trained(path: Path) -> bool:
    """Whether there is work to lose: not if the trainer has only written its settings there, and saved no step."""
    return path.exists() and ((path / TRACKER_FILE).exists() or not (path / COMMAND_FILE).exists())


@contextmanager
def _stopped_if(stops: list[int]) -> Iterator[None]:
    """A command that fails after it was asked to stop has stopped; it resumes when it is run again."""
    try:
        yield
    except MachineError as error:
        raise (StoppedError(str(error)) if stops else error) from error.__cause__


def _change(before: Mark | None, now: Mark) -> str | None:
    """Tell what has changed since a task ran; None if nothing has, or it has never run."""
    if before is None:
        return None
    if before.command != now.command:
        return f"{_COMMAND_CHANGED}{difference(before.command, now.command)}"
    for name, made in now.made_from.items():
        if before.made_from.get(name) != made:
            return f"{name} was made again"
    for name, checksum in now.files.items():
        if before.files.get(name) != checksum:
            return f"{name} has changed"
    is_same = (before.made_from, before.files) == (now.made_from, now.files)
    return None if is_same else "what it is made from has changed"
