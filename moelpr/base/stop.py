"""Signals that ask a training to stop, and processes that end with their launcher or their parent.

Imported before Megatron and torch, whose imports take seconds, so that no signal is lost meanwhile.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import util
from typing import NoReturn

import psutil

from moelpr.base.command import STOPPED

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# The environment variable that moelpr.torchrun sets to its process number.
LAUNCHER_VARIABLE = "MOELPR_LAUNCHER"
FT_LAUNCHER_VARIABLE = "FT_RANK_MONITOR_IPC_SOCKET"  # the one that NVRx's ft_launcher sets
# A rank sends this to moelpr.torchrun to say that the training ends before its last step.
STOPPED_SIGNAL = signal.SIGUSR2
_LIBC = ctypes.CDLL(None)  # loaded before a fork needs it


def kill_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_with_launcher() -> None:
    """Kill this rank when torchrun is gone: it would train on, next to the run's next start.

    The kernel does so at once if torchrun is this process's parent; with a script between them, a thread does.
    Other launchers (srun, mpirun) end their ranks themselves, and a rank started by hand may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    kill_with_parent()
    try:
        launcher = psutil.Process(int(os.environ.get(LAUNCHER_VARIABLE, os.getppid())))
    except psutil.NoSuchProcess:  # it was gone before
        sys.exit(1)
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()


def _end_with(launcher: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def exit_before_the_last_step() -> NoReturn:
    """End this rank of a training that was asked to stop.

    moelpr.torchrun is told and exits with `STOPPED`, but the rank with 0: for torchrun another code is a failure, after
    which it ends the ranks that still clean up, does not wait for other nodes, and may start all ranks again.
    """
    if LAUNCHER_VARIABLE in os.environ:
        os.kill(int(os.environ[LAUNCHER_VARIABLE]), STOPPED_SIGNAL)
    sys.exit(0 if {LAUNCHER_VARIABLE, FT_LAUNCHER_VARIABLE} & os.environ.keys() else STOPPED)


def watch_over_helpers() -> None:
    """Make checkpoint-writer processes ignore SIGUSR1 and SIGTERM, and end them when the trainer ends.

    Called in the trainer. A forked process becomes a helper here, a spawned one when it imports the main module.
    """
    util.register_after_fork(become_helper, lambda become: become())
    atexit.register(_end_helpers)  # multiprocessing would send SIGTERM, which they ignore, and wait


def become_helper() -> None:
    """Ignore the signals that ask a trainer to stop, and end with the parent process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that is killed, for example when it runs out of memory, can't end its helpers."""
    while (parent := multiprocessing.parent_process()) is None:
        time.sleep(0.1)  # spawned, and still importing
    parent.join()
    os._exit(1)


def _end_helpers() -> None:
    for helper in multiprocessing.active_children():
        helper.kill()
