"""A training step with its metrics against the same step without them.

Steps run in one process, which times what they spend on metrics: counting in the routers (and the LPR loss in stage 1,
which does not train on it), reducing the counts, the record, checking it for warnings, metrics.jsonl and TensorBoard on
a disk. Each part is timed where it runs, because two steps differ by more than the metrics take. Megatron's own log
line is not included. On a GPU the clock waits for the device before and after, which counts against the metrics.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import STAGES, install_megatron
from benchmarks.timing import Times, Turns

BASELINE = "step without metrics"


DEFAULTS = dict(layers=6, hidden=256, ffn=768, head=64, vocabulary=4096, sequences=16, length=128)
DEFAULTS |= dict(new_experts=4, original_copies=1, topk=2)


def run(turns: Turns, sizes: Namespace) -> Iterator[tuple[str, Times]]:
    install_megatron()
    from moelpr.megatron_patches.bootstrap import single_process

    with single_process(), tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            yield stage, measure(turns, stage, sizes, Path(folder, stage))


def measure(turns: Turns, stage: Any, sizes: Namespace, folder: Path) -> Times:
    """Seconds of each step, without and with its metrics."""
    from benchmarks.optimizer_steps import our_step, random_batch, spec_of

    torch.manual_seed(1)
    spec = spec_of(sizes)
    step = our_step(spec, stage, random_batch(spec, sizes.sequences))
    metrics, whole = Clock(turns.clock), Clock(turns.clock)
    times: Times = {BASELINE: [], "step": []}
    with logging_of(stage, step.model, sizes, folder) as log, timed_counting(stage, metrics):
        for number in range(-2, turns.rounds):  # two for warm-up
            metrics.seconds = whole.seconds = 0.0
            whole.run(lambda: metrics.run(log, step()))
            if number >= 0:
                times[BASELINE].append(whole.seconds - metrics.seconds)
                times["step"].append(whole.seconds)
    return times


class Clock:
    """Adds up the time of what it runs."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.seconds = now, 0.0

    def run(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        started = self.now()
        result = function(*arguments, **settings)
        self.seconds += self.now() - started
        return result


@contextmanager
def logging_of(stage: Any, model: torch.nn.Module, sizes: Namespace, folder: Path) -> Iterator[Any]:
    """A function that logs a step as the trainer does, given its loss."""
    from megatron.training import global_vars
    from torch.utils.tensorboard import SummaryWriter

    from moelpr.arguments.settings import Thresholds
    from moelpr.training.early_warnings import EarlyWarnings
    from moelpr.training.run_log import RunLog
    from moelpr.training.step_log import MetricsTracker, StepLog

    settings = Namespace(stage=stage, save=str(folder), train_iters=10**6, log_interval=10, data_parallel_size=1)
    settings.micro_batch_size, settings.seq_length = sizes.sequences, sizes.length
    settings.consumed_train_samples, settings.balance_loss_coeff = 0, 0.01
    tracker = MetricsTracker()
    tracker.watch([model])
    run_log = RunLog(stage, EarlyWarnings(stage, Thresholds(), lpr_loss_is_on=stage == "stage2"))
    step_log = StepLog(run_log, tracker)
    steps = iter(range(1, 10**6))

    def log(loss: float) -> None:
        tracker.routing = tracker.reduce_routing(sizes.layers)
        tracker.routing.log_line()
        step_log.step({"lm loss": torch.tensor(loss)}, 1e-5, next(steps), grad_norm=1.0)

    with (
        patch.object(global_vars, "_GLOBAL_ARGS", settings),
        patch.object(global_vars, "_GLOBAL_TENSORBOARD_WRITER", SummaryWriter(str(folder))),
        patch.object(run_log, "print", lambda line: None),
    ):
        yield log
    run_log.close()


@contextmanager
def timed_counting(stage: str, clock: Clock) -> Iterator[None]:
    """Add the time of the routers' counting to the clock."""
    from moelpr.model import router

    names = ["routing_vectors", "lpr_sums"] if stage == "stage1" else ["routing_vectors"]
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(patch.object(router, name, partial(clock.run, getattr(router, name))))
        yield
