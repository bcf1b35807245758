"""How every command of the project ends: exit code 0 done, 1 failed, 2 wrong arguments or input.

An error a user can cause is one sentence that says what was found, what was wanted and the remedy.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Wrong arguments or input. The message is the whole answer; no traceback is shown."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and leave the process with the right exit code.

    `UserError` ends with code 2 and its sentence, a full disk or Ctrl-C with code 1. Anything else is our own slip
    and keeps its traceback (code 1). With `--debug` on the command line, every error keeps its traceback.
    """
    debug = "--debug" in sys.argv
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # Leave by the front door, so that temporary files are removed on the way.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except UserError as error:
        if debug:
            raise
        # From a data loader's worker it comes wrapped in that worker's traceback.
        _fail(str(error).strip().rsplit("UserError: ", 1)[-1], code=2)
    except BrokenPipeError:
        # The reader (head, less) has closed: nothing is left to say and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(
            f"the disk is full while writing {error.filename or 'the output'}; free some space and run it again",
            code=1,
        )
    except RuntimeError as error:
        # Megatron's checkpoint writer runs in processes of its own and reports their failures as text.
        if debug or "No space left on device" not in str(error):
            raise
        _fail("the disk is full while writing a checkpoint; free some space and run it again", code=1)
    except KeyboardInterrupt:
        if debug:
            raise
        _fail("interrupted", code=1)


def _fail(message: str, code: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        # Rank 0 most likely says the same sentence; the launcher then ends this rank before it repeats it. On another
        # node nobody ends it: there the first rank speaks, for those who look at that node alone.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's handler would only take a note
        time.sleep(10 if os.environ.get("LOCAL_RANK", "0") == "0" else 20)
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
