"""What fraction of a training step's time do the metrics add? The limit is 2%.

    python -m benchmarks.metrics_overhead [--json FILE]

Runs steps in one process and times what they spend on metrics: counting in the routers (and the LPR loss in stage 1,
which does not train on it), reducing the counts, the record, checking it for warnings, metrics.jsonl and TensorBoard on
a disk. Each part is timed where it runs, because two steps differ by more than the metrics take. Megatron's own log
line is not included. On a GPU the clock waits for the device before and after, which counts against the metrics.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import STAGES, add_json, argument_parser, install_megatron, working_folder, write_json
from benchmarks.timing import timed_s

LIMIT = 0.02


def main() -> None:
    parser = argument_parser(
        __doc__, layers=6, hidden=256, ffn=768, head=64, new_experts=4, original_copies=1, topk=2, vocabulary=4096,
        sequences=16, length=128, rounds=40,
    )  # fmt: skip
    add_json(parser)
    args = parser.parse_args()
    install_megatron()
    from moelpr.megatron_patches.bootstrap import single_process

    with single_process(), working_folder(None) as folder:
        result = {stage: measure(stage, args, folder / stage) for stage in STAGES}
    for stage, found in result.items():
        print(
            f"{stage}: a step takes {found['step_time_s']:.3f} s; its metrics add {found['overhead']:.2%} to the rest "
            f"(median of {args.rounds} steps; limit: {LIMIT:.0%})"
        )
    write_json(result, args.json)


def measure(stage: Any, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median step time with metrics in seconds, and the median fraction that they add to the rest."""
    from benchmarks.steps import our_step, random_batch, spec_of

    torch.manual_seed(1)
    spec = spec_of(args)
    step = our_step(spec, stage, random_batch(spec, args.sequences))
    overheads, times = [], []
    clock = Clock()
    with logging_of(stage, step.model, args, folder) as log, timed_counting(stage, clock):
        for number in range(-2, args.rounds):  # two for warm-up
            clock.seconds = 0.0
            step_time_s, _ = timed_s(lambda: clock.run(log, step()))
            if number >= 0:
                overheads.append(clock.seconds / (step_time_s - clock.seconds))
                times.append(step_time_s)
    return {"step_time_s": statistics.median(times), "overhead": statistics.median(overheads)}


class Clock:
    """Adds up the time of what it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def run(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        results = []
        seconds, _ = timed_s(lambda: results.append(function(*arguments, **settings)))
        self.seconds += seconds
        return results[0]


@contextmanager
def logging_of(stage: Any, model: torch.nn.Module, args: argparse.Namespace, folder: Path) -> Iterator[Any]:
    """A function that logs a step as the trainer does, given its loss."""
    from megatron.training import global_vars
    from torch.utils.tensorboard import SummaryWriter

    from moelpr.training.early_warnings import EarlyWarnings, Thresholds
    from moelpr.training.metrics import MetricsTracker, StepLog
    from moelpr.training.run_log import RunLog

    settings = argparse.Namespace(
        stage=stage, save=str(folder), train_iters=10**6, log_interval=10, micro_batch_size=args.sequences,
        data_parallel_size=1, seq_length=args.length, consumed_train_samples=0, balance_loss_coeff=0.01,
    )  # fmt: skip
    tracker = MetricsTracker()
    tracker.watch([model])
    run_log = RunLog(stage, EarlyWarnings(stage, Thresholds(), lpr_loss_is_on=stage == "stage2"))
    step_log = StepLog(run_log, tracker)
    steps = iter(range(1, 10**6))

    def log(loss: float) -> None:
        tracker.routing = tracker.reduce_routing(args.layers)
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

    names = ["routing_vector", "lpr_loss"] if stage == "stage1" else ["routing_vector"]
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(patch.object(router, name, partial(clock.run, getattr(router, name))))
        yield


if __name__ == "__main__":
    main()
