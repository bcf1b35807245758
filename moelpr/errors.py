"""Exit codes of all commands: 0 for success, 1 for failure, 2 for wrong arguments or input.

An error that a user can cause is one sentence: what was expected, what was found, and the fix.
"""

import argparse
import errno
import locale
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """Wrong arguments or input. Only the message is shown, no traceback."""


class MachineError(RuntimeError):
    """A failing machine, such as a disk that can't be written. Only the message is shown; exit code 1."""


class CommandParser(argparse.ArgumentParser):
    """A parser with --debug and marks on required flags, which raises `UserError` for a wrong command line."""

    def __init__(self, **options: Any) -> None:
        if "\n" in (options.get("description") or ""):
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**options)
        if self.add_help:  # a parent of other parsers has neither
            self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def format_help(self) -> str:
        for action in self._actions:
            if action.option_strings and action.required and not str(action.help).endswith("(required)"):
                action.help = f"{action.help} (required)"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and exit with the right code.

    A `UserError` exits with code 2 and its message, a full disk or Ctrl-C with code 1 and a message. Anything else is a
    bug and keeps its traceback (code 1). With `--debug` on the command line, every error keeps its traceback.
    """
    _use_utf8()
    debug = "--debug" in sys.argv
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # Exit as usual, so that temporary files are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe, so there is no one to report to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, RuntimeError, KeyboardInterrupt) as error:
        message = _message(error)
        if debug or message is None:
            raise
        _fail(message, code=2 if isinstance(error, UserError) else 1)


def _use_utf8() -> None:
    """Start this command again in Python's UTF-8 mode if names and files would be ASCII (PYTHONUTF8=0, LC_ALL=C)."""
    if not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"  # for its child processes
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _message(error: BaseException) -> str | None:
    """The message for an error that a user can cause; None for a bug."""
    if isinstance(error, (UserError, MachineError)):
        return str(error).strip().rsplit("UserError: ", 1)[-1]  # a data loader's worker wraps it in its traceback
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while writing {error.filename or 'the output'}; free space and run it again"
    # Megatron's checkpoint writer runs in other processes and reports their failures as text.
    if isinstance(error, RuntimeError) and "No space left on device" in str(error):
        return "the disk is full while writing a checkpoint; free space and run it again"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else None


def _fail(message: str, code: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        # Rank 0 most likely prints the same message, and the launcher then ends this rank before it prints it again.
        # Nothing ends the ranks of another node: there the first one prints it, for those who only see that node's log.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's handler would only set a flag
        time.sleep(10 if os.environ.get("LOCAL_RANK", "0") == "0" else 20)
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
