"""Run one command with a log, an environment and a time limit."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


def execute(
    words: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    limit_s: float | None = None,
    stderr: int | None = None,
) -> int | None:
    """Run a launcher (`*.sh`), or Python with these arguments, in the current folder.

    Args:
        log: File to which its output is appended.
        environment: Variables on top of this process's.
        limit_s: After this time it is killed, with all processes that it started.
        stderr: `subprocess.STDOUT` appends its errors to the log too; by default they are shown.

    Returns:
        Its exit code; None if it was killed.
    """
    with open(log, "a") as file:
        process = psutil.Popen(
            [*interpreter(words), *words], stdout=file, stderr=stderr, env={**os.environ, **environment}
        )
        try:
            return int(process.wait(limit_s))
        except psutil.TimeoutExpired:
            for one in [*process.children(recursive=True), process]:  # ranks have sessions of their own
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            return None


def interpreter(words: Sequence[str]) -> list[str]:
    """The start of the command line: this Python, unless the command is a shell script."""
    return [] if words[0].endswith(".sh") else [sys.executable]
