"""Run one command with a log, an environment and a time limit."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from moelpr.base.stop import kill_with_parent

_running: set[psutil.Popen] = set()


def execute(
    words: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    limit_s: float | None = None,
    stderr: int | None = None,
    echo: bool = False,
) -> int | None:
    """Run a launcher (`*.sh`), a subcommand (`moelpr …`), or Python with these arguments, in the current folder.

    Should this process be killed, so is the command.

    Args:
        log: File to which its output is appended.
        environment: Variables on top of this process's.
        limit_s: After this time it is killed, with all processes that it started.
        stderr: `subprocess.STDOUT` appends its errors to the log too; by default they are shown.
        echo: Show its output too, as a cluster keeps what a job prints.

    Returns:
        Its exit code; None if it was killed after `limit_s`.
    """
    with open(log, "ab") as file:
        process = psutil.Popen(
            [*interpreter(words), *words],
            stdout=subprocess.PIPE if echo else file,
            stderr=stderr,
            env={**os.environ, **environment},
            preexec_fn=kill_with_parent,
        )
        _running.add(process)
        try:
            while echo and (part := process.stdout.read1()):
                file.write(part)
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
            return int(process.wait(limit_s))
        except psutil.TimeoutExpired:
            for one in [*process.children(recursive=True), process]:  # ranks have sessions of their own
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            return None
        finally:
            _running.discard(process)


def interpreter(words: Sequence[str]) -> list[str]:
    """The start of the command line: this Python, unless the command is a shell script."""
    if words[0].endswith(".sh"):
        return []
    return [sys.executable, "-P", "-m"] if words[0] == "moelpr" else [sys.executable]


@contextmanager
def passes_on_stops() -> Iterator[list[int]]:
    """Pass SIGTERM on to the commands that run, of which a training saves its last step; yield the signals so far."""
    arrived: list[int] = []

    def pass_on(number: int, _: object) -> None:
        arrived.append(number)
        for process in list(_running):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, before)
