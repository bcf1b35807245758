"""How a run ends: after its last step, or earlier on request.

SIGUSR1, SIGTERM or a file STOP in --save ask the trainer to stop. It finishes its step, saves, and exits with code 75
(`moelpr.base.command.STOPPED`); the same command resumes the run. A run that has made all its steps writes a file
FINISHED, and does not run again.

Imported before Megatron and torch, whose imports take seconds, so that no signal is lost meanwhile.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from moelpr.base.errors import UserError, is_lost_connection
from moelpr.base.ranks import is_first_rank
from moelpr.base.run_folder import FINISHED_FILE, STOP_FILE, BestStep, read_settings, saved_step
from moelpr.base.stop import SIGNALS

if TYPE_CHECKING:  # the settings import Megatron
    from moelpr.train.arguments.settings import RunSettings
    from moelpr.train.early_stop import EarlyStop


class StopRequest:
    """Whether any rank was asked to stop. Replaces Megatron's handler, which supports only one signal."""

    def __init__(self) -> None:
        self.received: set[int] = set()  # members of `SIGNALS` that have arrived
        self.file: Path | None = None  # the stop file, which only rank 0 looks for
        self._previous_handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def enter_megatron(self, save: Path | None) -> None:
        """Have Megatron call `signals_received` after every step. Without --save, signals end the process at once."""
        if save is None:
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)
            return
        from moelpr.model.megatron import hooks

        self.file = save / STOP_FILE
        self.listen()  # --exit-signal-handler has installed another handler
        hooks.set_signal_handler(self)

    def signals_received(self) -> list[bool]:
        """Whether any rank was asked to stop: a collective that Megatron calls on every rank after each step."""
        import torch

        assert self.file is not None
        is_asked = bool(self.received) or (is_first_rank() and self.file.exists())
        answer = torch.tensor([is_asked], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        return [bool(answer.item())]

    @contextmanager
    def leaves_lost_ranks_to_launcher(self) -> Iterator[None]:
        """End by SIGTERM if another rank is lost after SIGTERM has arrived.

        The launcher has then sent it to end this rank, and reports itself which one has failed.
        """
        try:
            yield
        except RuntimeError as error:
            if signal.SIGTERM in self.received and is_lost_connection(error):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
            raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)


@contextmanager
def stops_on_request(settings: "RunSettings", request: StopRequest | None) -> Iterator[None]:
    """Train until the end or a request, after which Megatron leaves its training loop with sys.exit(0).

    Raises:
        UserError: Megatron called sys.exit() instead, as where it can't load a checkpoint: that is exit code 0 too.
    """
    if request is not None:
        request.enter_megatron(settings.save)
    if settings.save is not None and is_first_rank():
        for name in (FINISHED_FILE, BestStep.FILE_NAME):  # the run is continued
            (settings.save / name).unlink(missing_ok=True)
    try:
        yield
    except SystemExit as error:
        if error.code is None:
            raise UserError(
                "Megatron could not load the checkpoint, as its last message above says; copy the checkpoint again, or "
                "use another step (--ckpt-step)"
            ) from error
        if error.code != 0:
            raise


def is_finished(settings: "RunSettings", early_stop: "EarlyStop | None" = None) -> bool:
    """True if --save already contains this run's last step, or held-out text has ended it.

    Raises:
        UserError: It was trained from another checkpoint or on other data, which it would ignore.
    """
    start, save = settings.start, settings.save
    if save is None or not start.is_resumed or start.selected_step is not None or start.checkpoint != save:
        return False
    is_over = early_stop is not None and early_stop.is_over
    if start.saved_step is None or (start.saved_step < settings.last_step and not is_over):
        return False
    record = read_settings(save) or {}
    pretrained = [str(start.pretrained)] if start.pretrained else []
    for flag, suffix, values in (("pretrained-checkpoint", "", pretrained), ("data-path", ".idx", settings.data_path)):
        recorded = record.get(flag.replace("-", "_")) or []
        trained_with = [recorded] if isinstance(recorded, str) else recorded
        before, now = ([Path(f"{item}{suffix}").resolve() for item in items] for items in (trained_with, values))
        if now and now != before and any(path.exists() for path in before):  # else they were moved
            raise UserError(
                f"{save} contains a finished run trained with --{flag} {' '.join(trained_with)}; choose another "
                "--save, or rerun the original command"
            )
    return True


def report_end(settings: "RunSettings", scored_step: int | None, early_stop: "EarlyStop | None" = None) -> bool:
    """Print on rank 0 where the run stands and how to resume it, and record a complete run in the file FINISHED.

    `scored_step` was validated last; it is the last step if nothing is to be validated. Megatron does not validate
    after a stop request, and has no batches with which to resume a run that has made all its steps. `early_stop` may
    have ended the run, and selects its best step.

    Returns:
        Whether rank 0 has found the last step in --save; True on the other ranks, and without --save.
    """
    save, last = settings.save, settings.last_step
    if save is None or not is_first_rank():
        return True
    (save / STOP_FILE).unlink(missing_ok=True)
    saved = saved_step(save)
    is_complete = saved is not None and (saved >= last or (early_stop is not None and early_stop.is_over))
    if is_complete:
        best = early_stop.end() if early_stop is not None else None
        saved = best.step if best else saved
        (save / FINISHED_FILE).write_text(f"{saved}\n")
        print(f"moelpr: {settings.stage.name} is finished, step {saved} of {last} is in {save}")
        if best:
            print(f"moelpr: of {best.made} trained steps it has the lowest loss on held-out text, {best.loss:.4f}")
            scored_step = last if best.made < last else scored_step
        if scored_step is None or scored_step < last:
            print("moelpr: its last step was not validated; moelpr evaluate scores it")
    else:
        print(f"moelpr: stopped after step {saved} of {last}, saved in {save}; rerun the same command to resume")
    sys.stdout.flush()
    return is_complete
