"""How a run ends: with its last step, or earlier because someone wants the machine back.

SIGUSR1, SIGTERM or a file STOP in --save ask the trainer to stop. It then finishes its step, saves and ends with code
0; the same command goes on. A run that has made all its steps says so in a file FINISHED, and is not run again.

Imported before Megatron and torch, which take seconds: a signal is not lost meanwhile.
"""

import argparse
import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from pathlib import Path
from types import FrameType

from moelpr.run_folder import FINISHED_FILE, STOP_FILE, TRACKER_FILE

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Whether anyone asked any rank to stop; takes the place of Megatron's handler, which knows one signal."""

    def __init__(self) -> None:
        self.is_received = False
        self.file: Path | None = None  # looked for by rank 0 alone
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def enter_megatron(self, args: argparse.Namespace) -> None:
        """Be asked by Megatron after every step."""
        from megatron.training import global_vars

        if args.save is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # nothing could be saved: end at once
            return
        self.file = Path(args.save) / STOP_FILE
        self.listen()  # --exit-signal-handler has put another one there
        args.exit_signal_handler = True
        global_vars._GLOBAL_SIGNAL_HANDLER = self

    def signals_received(self) -> list[bool]:
        """The ranks' common answer. Megatron's collective; every rank calls it after each step."""
        import torch

        is_wanted = self.is_received or (torch.distributed.get_rank() == 0 and _exists(self.file))
        answer = torch.tensor([is_wanted], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        return [bool(answer.item())]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.is_received = True


@contextmanager
def ends_the_run() -> Iterator[None]:
    """Megatron leaves its training loop by sys.exit(0) once signals_received() says so."""
    try:
        yield
    except SystemExit as end:
        if end.code != 0:
            raise


def watch_over_helpers() -> None:
    """The processes in which Megatron writes checkpoints outlive a signal to the whole job, but not their trainer.

    Called in the trainer. What it forks becomes a helper here, what it spawns when it imports the main module.
    """
    util.register_after_fork(become_helper, lambda become: become())
    atexit.register(_end_helpers)  # multiprocessing would send them the SIGTERM they ignore, and wait


def become_helper() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that is killed, for lack of memory say, can't tell its helpers."""
    while (parent := multiprocessing.parent_process()) is None:
        time.sleep(0.1)  # spawned, and still importing
    parent.join()
    os._exit(1)


def _end_helpers() -> None:
    for helper in multiprocessing.active_children():
        helper.kill()


def is_finished(args: argparse.Namespace) -> bool:
    """True where --save holds this run's last step: nothing is left to do."""
    if args.save is None or not args.is_resumed or args.ckpt_step is not None:
        return False
    if Path(args.model_source) != Path(args.save):  # it is --load's
        return False
    last, saved = _last_step(args), _saved_step(Path(args.save))
    return last is not None and saved is not None and saved >= last


def tell_how_it_ended(args: argparse.Namespace) -> None:
    """Rank 0 says where the run stands and how to go on, and keeps it for scripts in the file FINISHED."""
    if args.save is None or int(os.environ.get("RANK", "0")) > 0:
        return
    save = Path(args.save)
    (save / STOP_FILE).unlink(missing_ok=True)
    saved, last = _saved_step(save), _last_step(args)
    if saved is not None and last is not None and saved >= last:
        (save / FINISHED_FILE).write_text(f"{saved}\n")
        print(f"moelpr: {args.stage} is finished, step {saved} of {last} is in {save}")
    else:
        print(f"moelpr: stopped after step {saved} of {last}, saved in {save}; give the same command again to go on")
    sys.stdout.flush()


def begin(args: argparse.Namespace) -> None:
    """Rank 0 takes the mark of an earlier end away: this run goes on."""
    if args.save is not None and int(os.environ.get("RANK", "0")) == 0:
        (Path(args.save) / FINISHED_FILE).unlink(missing_ok=True)


def _last_step(args: argparse.Namespace) -> int | None:
    """None where only Megatron's ramp-up of the batch size knows, which it tells when it builds the run."""
    if args.train_iters:
        return int(args.train_iters)
    if args.train_samples and args.global_batch_size and not args.rampup_batch_size:
        return int(args.train_samples // args.global_batch_size)
    return None


def _saved_step(save: Path) -> int | None:
    tracker = save / TRACKER_FILE
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text.isdecimal() else None


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()
