"""What the metrics add to a training step: at most 2% is wanted.

    python benchmarks/metrics_overhead.py [--json FILE]

A step in one process, and what of its time goes to metrics: counting in the routers (in stage 1, where it is not
trained on, the LPR loss too), reducing the counts, the record, judging it for warnings, metrics.jsonl and TensorBoard
on a disk. Each of these is timed where it happens: two steps differ by more than the metrics take. Megatron's own log
line is left out. On a GPU the clock waits for the device before and after, which counts against the metrics.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in benchmarks/ only

from benchmarks.train_step import STAGES, our_step, random_batch, spec_of, timed_s  # noqa: E402
from moelpr.megatron_patches import cpu, megatron_fixes  # noqa: E402

WANTED = 0.02


def main() -> None:
    arguments = _arguments()
    cpu.install()  # before Megatron is imported; does nothing where a GPU is present
    megatron_fixes.install()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from moelpr.model.loading import single_process

    with single_process(), tempfile.TemporaryDirectory() as folder:
        result = {stage: measure(stage, arguments, Path(folder) / stage) for stage in STAGES}
    for stage, found in result.items():
        print(
            f"{stage}: a step takes {found['step_time_s']:.3f} s; its metrics add {found['overhead']:.2%} to the rest "
            f"(median of {arguments.rounds} steps; wanted: at most {WANTED:.0%})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(stage: Any, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median step time with metrics in seconds, and the median of the share that they add to the rest."""
    torch.manual_seed(1)
    spec = spec_of(arguments)
    step = our_step(spec, stage, random_batch(spec, arguments.sequences))
    shares, times = [], []
    clock = Clock()
    with _logging(stage, step.model, arguments, folder) as log, _timed_counting(stage, clock):
        for round_ in range(arguments.rounds + 2):
            clock.seconds = 0.0
            whole, _ = timed_s(lambda: clock.run(log, step()))
            if round_ >= 2:  # the first are warm-up
                shares.append(clock.seconds / (whole - clock.seconds))
                times.append(whole)
    return {"step_time_s": statistics.median(times), "overhead": statistics.median(shares)}


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
def _logging(stage: str, model: torch.nn.Module, arguments: argparse.Namespace, folder: Path) -> Iterator[Any]:
    """A function that logs a step as the trainer does, given its loss."""
    from megatron.training import global_vars
    from torch.utils.tensorboard import SummaryWriter

    from moelpr.training.early_warnings import EarlyWarnings, Thresholds
    from moelpr.training.metrics import MetricsTracker, StepLog
    from moelpr.training.run_log import RunLog

    settings = argparse.Namespace(
        stage=stage, save=str(folder), train_iters=10**6, log_interval=10, micro_batch_size=arguments.sequences,
        data_parallel_size=1, seq_length=arguments.length, consumed_train_samples=0, balance_loss_coeff=0.01,
        num_original_experts=1, num_experts=arguments.new_experts,
    )  # fmt: skip
    tracker = MetricsTracker()
    tracker.watch([model])

    run_log = RunLog(stage, EarlyWarnings(stage, Thresholds(), lpr_loss_is_on=stage == "stage2"))
    step_log = StepLog(run_log, tracker)
    steps = iter(range(1, 10**6))

    def log(loss: float) -> None:
        tracker.routing = tracker.reduce_routing(arguments.layers)
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
def _timed_counting(stage: str, clock: Clock) -> Iterator[None]:
    from moelpr.model import router

    names = ["routing_vector", "lpr_loss"] if stage == "stage1" else ["routing_vector"]
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(patch.object(router, name, partial(clock.run, getattr(router, name))))
        yield


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 6, "hidden": 256, "ffn": 768, "head": 64, "new-experts": 4, "topk": 2, "vocabulary": 4096}
    for name, default in {**sizes, "sequences": 16, "length": 128, "rounds": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
