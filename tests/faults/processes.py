"""Commands as processes that can be limited, killed and searched for what they leave behind."""

import os
import re
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from random import Random
from typing import NoReturn

from benchmarks.common import environment
from moelpr.base.command import run_command
from moelpr.base.settings import call
from moelpr.base.tools import COMMANDS

# More than any case needs; a command that takes more has read a size from a damaged file.
MEMORY_BYTES = 4 << 30
CPU_S = 100  # for one process
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # run_command handles them
# Seconds as `Patience` counts them: for a command, and for what is left after a killed one (docs/reliability.md).
HANGS_AFTER_S = 150
ORPHANS_AFTER_S = 10


class Failure(Exception):
    """A case did not end as it must; its text says how."""


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code (−N: signal N), and what it printed."""

    code: int
    output: str
    errors: str

    @property
    def never_started(self) -> bool:
        """Whether a signal reached Python while it initialized itself, before it ran a line of the command."""
        return "Fatal Python error: init_" in self.errors

    def require_clean(self) -> None:
        """Raise `Failure` unless it succeeded, or failed with code 1 or 2 and one sentence."""
        if "Traceback (most recent call last)" in self.errors or "panicked at" in self.errors:
            raise Failure(f"a traceback:\n{self.last_words()}")
        if self.code not in (0, 1, 2):
            raise Failure(f"exit code {self.code}:\n{self.last_words()}")
        if self.code:
            self.require_sentence()

    def require_sentence(self) -> None:
        """Raise `Failure` unless the last that it printed is one error, perhaps a list of wrong settings."""
        actual = re.search(r"^[\w. -]+: error: (.+)\n?((?:.*\n?)*)\Z", self.errors, re.MULTILINE)
        if not actual or any(not line.startswith("- ") for line in actual[2].splitlines()):
            raise Failure(f"exit code {self.code} without one sentence:\n{self.last_words()}")

    def last_words(self) -> str:
        return "\n".join(f"    {line[:300]}" for line in self.errors.splitlines()[-8:])


class Patience:
    """Counts the seconds in which all of some processes sleep, and their CPU time: neither grows for want of a CPU."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._spent_s = limit_s, 0.0
        self._last, self._cpu_s = time.monotonic(), dict[int, float]()

    def is_over(self, pids: list[int]) -> bool:
        now, cpu_s, all_sleep = time.monotonic(), dict[int, float](), True
        for pid in pids:
            if fields := _status(pid):
                cpu_s[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                all_sleep &= fields[0] not in "RD"  # running or waiting for a CPU, or for a disk
        self._spent_s += sum(max(0, spent - self._cpu_s.get(pid, spent)) for pid, spent in cpu_s.items())
        self._spent_s += all_sleep * (now - self._last)
        self._last, self._cpu_s = now, cpu_s
        return self._spent_s > self._limit_s


class Running:
    """A command in a session of its own, with the current folder `box`; its output is next to that folder.

    Args:
        become: turns a fork of this process into the command, and does not return.
        name: of the output's files.
        mark: in the environment of all its processes, if some leave the session.
    """

    def __init__(self, become: Callable[[], object], box: Path, name: str = "", mark: str = "") -> None:
        self._mark = mark.encode()
        if len(os.listdir("/proc/self/task")) > 1:
            raise Failure("this process has threads, whose locks would stay locked in a fork")
        self._paths = [box.with_name(f"{name}{stream}") for stream in ("stdout", "stderr")]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number in SIGNALS:  # before the session, to which the signals go
                    signal.signal(number, signal.SIG_DFL)
                os.setsid()
                os.chdir(box)
                streams = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in self._paths]
                for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
                    os.dup2(stream, number)
                become()
            finally:
                os._exit(1)
        self._end = os.pidfd_open(self.pid)

    @classmethod
    def forked(
        cls, command: str, words: Iterable[str], box: Path, name: str = "", variables: Mapping[str, str] | None = None
    ) -> "Running":
        """A command in a copy of this process, which has imported everything: starts within milliseconds."""
        return cls(lambda: _run_main(command, list(words), variables or {}), box, name)

    @classmethod
    def launched(cls, command: Iterable[str | Path], box: Path, **variables: str) -> "Running":
        """Any command, as from a shell."""
        words = list(map(str, command))
        all_variables = environment(OMP_NUM_THREADS="1", MOELPR_FAULTS_BOX=str(box), **variables)
        return cls(lambda: os.execve(words[0], words, all_variables), box, mark=f"MOELPR_FAULTS_BOX={box}")

    def is_over(self, timeout_s: float = 0) -> bool:
        return bool(select.select([self._end], [], [], timeout_s)[0])

    def wait(self) -> Ended:
        """Raises `Failure` if it hangs, or if one of its processes outlives it."""
        patience = Patience(HANGS_AFTER_S)
        while not self.is_over(0.5):
            if patience.is_over(self._family()):
                self.kill_all()
                raise Failure(f"hangs: no end after {HANGS_AFTER_S} s of sleep or work")
        _, status = os.waitpid(self.pid, 0)
        os.close(self._end)
        patience = Patience(ORPHANS_AFTER_S)
        while left := self._family():
            if patience.is_over(left):
                names = ", ".join(map(_command_line, left))
                self.kill_all()
                raise Failure(f"{len(left)} processes still run {ORPHANS_AFTER_S} s after the command: {names}")
            time.sleep(0.05)
        # A fork that was killed at once has not opened them.
        output, errors = (path.read_text(errors="replace") if path.exists() else "" for path in self._paths)
        return Ended(os.waitstatus_to_exitcode(status), output, errors)

    def send(self, number: int, whom: str, random: Random) -> None:
        """Send a signal to the "group", to the "launcher" alone, or to "one" of the processes that it started."""
        with suppress(ProcessLookupError):
            if whom == "group":
                os.killpg(self.pid, number)
            else:
                others = [pid for pid in self._family() if pid != self.pid]
                os.kill(random.choice(others) if whom == "one" and others else self.pid, number)

    def kill_all(self) -> None:
        for pid in self._family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _family(self) -> list[int]:
        """All processes that belong to the command and have not ended."""
        pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
        return [pid for pid in pids if self._owns(pid)]

    def _owns(self, pid: int) -> bool:
        with suppress(OSError):
            # torchrun's ranks have sessions of their own.
            is_marked = bool(self._mark) and self._mark in Path(f"/proc/{pid}/environ").read_bytes()
            if is_marked or os.getsid(pid) == self.pid:
                return bool(fields := _status(pid)) and fields[0] != "Z"
        return False


def _status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; [] if the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return []


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:100]
    return "ended meanwhile"


def function_of(command: str) -> Callable[..., None]:
    """The function of a subcommand, or the `main` of a module."""
    return COMMANDS[command].load() if command in COMMANDS else import_module(command).main


def _run_main(command: str, words: list[str], variables: Mapping[str, str]) -> NoReturn:
    """Turn this forked process into a command with limits; does not return."""
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w"), open(2, "w", 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    os.environ |= variables
    sys.argv[:] = [command.rsplit(".", 1)[-1], *words]
    try:
        os._exit(_exit_code(lambda: call(function_of(command), words)))
    except KeyboardInterrupt:  # before or after the command: it ends a process as the signal does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)


def _exit_code(main: Callable[[], None]) -> int:
    """The exit code of a command, whose error is printed as Python would print it."""
    code = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
        run_command(main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if code != (end.code or 0):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    for number in SIGNALS:  # as run_command does it at the end of a process
        signal.signal(number, signal.SIG_DFL)
    # As at the end of a process: threads that end executors, then multiprocessing's children.
    threading._shutdown()  # type: ignore[attr-defined]
    util._exit_function()  # type: ignore[attr-defined]
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code
