"""The frame of every command: parse flags, print one error, handle signals, exit with the right code.

The exit codes are 0 for success, 1 for failure, 2 for wrong arguments or input, and `STOPPED` for a training that was
asked to stop before its last step.
"""

import argparse
import errno
import locale
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import FrameType, TracebackType
from typing import Any, NoReturn

from moelpr.base import ranks
from moelpr.base.errors import (
    DISK_FULL,
    MachineError,
    StoppedError,
    UserError,
    did_you_mean,
    is_lost_connection,
    printable,
    reports_panics,
    taken_port,
)
from moelpr.base.secrets import without_secrets

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes the training
# The environment variable with which, if it is 1, the code is 0, for a scheduler to which every other code of a node is
# a failure that ends the other nodes.
STOPPED_IS_SUCCESS = "MOELPR_STOPPED_IS_SUCCESS"
_NO_MEGATRON = (
    "Megatron is not installed, without which checkpoints can be converted and exported, but neither trained nor "
    "evaluated; install moelpr on Linux, where pip installs it too, or pass an export"
)


class CommandParser(argparse.ArgumentParser):
    """A parser with --debug and marks on required flags, which raises `UserError` for the first wrong argument.

    The trainer has a parser of its own (`moelpr.train.arguments.flags.Parser`), which goes on after an error.
    """

    def __init__(self, **options: Any) -> None:
        if "\n" in (options.get("description") or ""):
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def format_help(self) -> str:
        for action in self._actions:
            if action.option_strings and action.required and not str(action.help).endswith("(required)"):
                action.help = f"{action.help} (required)"
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Report an unrecognized flag first; argparse would report the required one that it may be a misspelling of."""
        words = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        for word in takewhile(lambda word: word != "--", words):
            flag = word.split("=")[0]
            if flag.startswith("--") and not any(name.startswith(flag) for name in known):
                self.error("; ".join(filter(None, (f"unrecognized argument {flag}", did_you_mean(flag, known)))))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        repeated = [action.option_strings[0] for action in self._actions if isinstance(action, argparse._AppendAction)]
        if repeated and re.match("unrecognized arguments: .*=", message):
            message += f"; write the flag before each value: {repeated[0]} A=… {repeated[0]} B=…"
        raise UserError(re.sub("^argument (.*?): must", r"\1 must", f"{message}; see --help"))


def stopped_code() -> int:
    """The exit code for a training that was asked to stop before its last step."""
    return 0 if os.environ.get(STOPPED_IS_SUCCESS) == "1" else STOPPED


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and exit with the right code.

    A `UserError` exits with code 2 and its message, a full disk or Ctrl-C with code 1 and a message. Anything else is a
    bug and keeps its traceback (code 1). With `--debug` on the command line, every error keeps its traceback.
    """
    debug = "--debug" in sys.argv
    if signal.getsignal(SIGTERM) is signal.SIG_DFL:
        signal.signal(SIGTERM, _exit_by_signal)
    try:
        try:
            if locale.getpreferredencoding(False).lower() != "utf-8":
                raise UserError("the locale's encoding is not UTF-8; set PYTHONUTF8=1")
            with reports_panics(hides_trace=False):
                main()
        except SystemError as error:
            # C code during which a signal's handler raised.
            if isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
                raise error.__cause__ from None
            raise
        finally:
            print(end="", flush=True)  # here, because Python itself can't report that it fails
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe, so there is no one to report to.
        _discard_unwritable()
        sys.exit(1)
    except (UserError, OSError, RuntimeError, ModuleNotFoundError, KeyboardInterrupt) as error:
        if (message := _message(error)) is None:
            raise
        log = os.environ.get("TORCHELASTIC_ERROR_FILE")  # next to a rank's own file of stderr (torchrun's --redirects)
        if debug or (isinstance(error, RuntimeError) and log and Path(log).with_name("stderr.log").exists()):
            traceback.print_exc()
        _fail(message, error)
    finally:
        _raise_no_signals()


def _exit_by_signal(number: int, _: FrameType | None) -> NoReturn:
    """Exit as usual, so that temporary files are removed."""
    sys.exit(128 + number)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Handle SIGTERM and Ctrl-C after the block: compiled code that calls Python must not see their exceptions.

    Only in the main thread, which handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {n: signal.signal(n, lambda n, _: arrived.append(n)) for n in (SIGTERM, SIGINT)}
    try:
        yield
    finally:
        for deferred, handler in before.items():
            signal.signal(deferred, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)


def _raise_no_signals() -> None:
    """Give signals their default effect: while Python shuts down, their exceptions would be tracebacks."""
    for number, handler in ((SIGTERM, _exit_by_signal), (SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is handler:
            signal.signal(number, signal.SIG_DFL)


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report Ctrl-C during imports in one line."""
    if issubclass(kind, KeyboardInterrupt) and "--debug" not in sys.argv:
        _print_error("interrupted")
    else:
        sys.__excepthook__(kind, error, trace)


def show_unraisable(failure: Any) -> None:
    """Leave out streams above a file whose writing has failed and been reported: torch's, of checkpoints.

    A signal that came during `__del__` or a callback of `weakref`, where Python drops its exception, comes again.
    """
    is_of_closed_file = isinstance(failure.exc_value, ValueError) and "closed file" in str(failure.exc_value)
    # A signal while a progress bar is made leaves one without attributes, which its `__del__` reads.
    is_half_made = isinstance(failure.exc_value, AttributeError) and "tqdm.__del__" in repr(failure.object)
    if isinstance(failure.exc_value, KeyboardInterrupt | SystemExit):
        number = SIGINT if isinstance(failure.exc_value, KeyboardInterrupt) else SIGTERM
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    elif not (is_of_closed_file or is_half_made):
        sys.__unraisablehook__(failure)


def _discard_unwritable() -> None:
    """Connect standard streams that can't be written to /dev/null, or Python would report it when it exits."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_is_utf8(path: str, what: str) -> None:
    """Check that a path can be named in results, which are UTF-8.

    Raises:
        UserError: The path is not UTF-8.
    """
    if (shown := os.fsencode(path).decode(errors="backslashreplace")) != path:
        raise UserError(f"the name of the {what} {shown} is not UTF-8; rename the file")


def _message(error: BaseException) -> str | None:
    """The message for an error that a user can cause; None for a bug."""
    if isinstance(error, (UserError, MachineError)):
        return str(error).strip().rsplit("UserError: ", 1)[-1]  # a data loader's worker wraps it in its traceback
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:40]}… is too long for the name of a file; pass a shorter one"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"the disk is full while writing {error.filename or 'the output'}; free space and run it again"
    if isinstance(error, ModuleNotFoundError):
        return _NO_MEGATRON if str(error.name).partition(".")[0] == "megatron" else None
    # Megatron's checkpoint writer runs in other processes and reports their failures as text.
    if isinstance(error, RuntimeError) and "No space left on device" in str(error):
        return "the disk is full while writing a checkpoint; free space and run it again"
    if is_lost_connection(error):
        return "another rank has ended, see its message or its node's log; run the same command again to resume"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else taken_port(error)


def _fail(message: str, error: BaseException) -> NoReturn:
    if isinstance(error, KeyboardInterrupt) and "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit(128 + SIGINT)  # the launcher reports it
    if not ranks.is_first_rank() or is_lost_connection(error):
        # Rank 0 most likely prints the same message, or the launcher why another rank has ended, and the launcher then
        # ends this rank before it prints it again. Nothing ends the ranks of another node: there the first one prints
        # it, for those who only see that node's log.
        signal.signal(SIGTERM, signal.SIG_DFL)  # the trainer's handler would only set a flag
        time.sleep(10 if ranks.local_rank() == 0 else 20)
    _discard_unwritable()
    _print_error(message)
    if isinstance(error, StoppedError):
        sys.exit(stopped_code())
    is_wrong_input = (
        isinstance(error, UserError | ModuleNotFoundError) or getattr(error, "errno", None) == errno.ENAMETOOLONG
    )
    sys.exit(2 if is_wrong_input else 1)


def _print_error(message: str) -> None:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    # Names and files may contain control characters; only a list of settings has several lines.
    lines = [printable(line) for line in without_secrets(message).split("\n- ")]
    with suppress(OSError):  # stderr may be a pipe that its reader has closed
        print(f"{name}: error:", "\n- ".join(lines), file=sys.stderr, flush=True)
