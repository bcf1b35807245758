"""Errors that a user can cause: each is one sentence with what was expected, what was found, and the fix."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from difflib import get_close_matches

# Characters that end a line, or that a terminal, a scheduler or a system call takes for something else than text.
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # the errno of an OSError


class UserError(ValueError):
    """Wrong arguments or input. Only the message is shown, no traceback."""


class MachineError(RuntimeError):
    """A failing machine, such as a disk that can't be written. Only the message is shown; exit code 1."""


class StoppedError(MachineError):
    """A command that was asked to stop before its end, and resumes when it is run again; exit code `STOPPED`."""


def printable(text: str) -> str:
    """The text with escapes in the place of what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, without a full stop, to be part of one of our sentences."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


# Names of settings elsewhere, which are not near by their letters.
_OTHER_NAMES = dict.fromkeys(("file", "files", "path", "data", "train"), "text")
_OTHER_NAMES |= {"learning-rate": "lr", "batch-size": "global-batch-size", "validation": "held_out", "test": "held_out"}


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Ask for the nearest of the known names; if none is near, give the other hint."""
    known = [*known]
    nearest = [one for one in known if one == _OTHER_NAMES.get(name)] or get_close_matches(name, known, n=1)
    nearest = nearest or [one for one in known if len(name) > 2 and name in one]
    return f"did you mean {nearest[0]}?" if nearest else otherwise


def is_lost_connection(error: BaseException) -> bool:
    """Whether gloo has lost the connection to another rank, which has reported why it ended, or was killed."""
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def taken_port(error: BaseException) -> str | None:
    """The message for a port that another program has taken before the ranks could meet there; None for others."""
    if not isinstance(error, RuntimeError) or "EADDRINUSE" not in str(error):
        return None
    number = re.search(r"port: (\d+)", str(error))
    return (
        f"port {number[1] if number else 'of the ranks'} is taken by another program; pass another --master-port to "
        "all nodes, or run the same command again"
    )


@contextmanager
def reports_panics(hides_trace: bool = True) -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no `Exception` and cannot be pickled, into a `UserError`.

    Args:
        hides_trace: Whether to hide the stack trace that Rust prints before it raises one. All threads share stderr, so
            it stays if others may write there meanwhile. Daemon threads print nothing.
    """
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    with _kept_stderr() if hides_trace and threads == [threading.current_thread()] else nullcontext():
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"the tokenizers library fails with this tokenizer ({first_line(error)}); download the tokenizer again"
            ) from None


@contextmanager
def _kept_stderr() -> Iterator[None]:
    """Show what is printed to stderr only in the end, and nothing of it if there is an exception."""
    with os.fdopen(os.memfd_create("stderr"), "r+b") as printed, os.fdopen(os.dup(2), "wb") as stderr:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except Exception:
            printed.truncate(0)
            raise
        finally:
            os.dup2(stderr.fileno(), 2)
            printed.seek(0)
            with suppress(OSError):
                shutil.copyfileobj(printed, stderr)
