"""What the metrics add to a training step: at most 2% is wanted.

    python benchmarks/metrics_overhead.py [--json FILE]

The same model makes the same steps in one process, in turns with metrics and without. With: routers count, counts are
reduced, a record is made, judged for warnings, and written to metrics.jsonl and TensorBoard on a disk. Without: nothing
of that, and where the LPR loss is not trained on it is not computed. Megatron's own log line is left out of both.
Overheads are medians over the rounds of the ratio of neighbouring steps, by wall time and by CPU time, which other
processes on the machine disturb less.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in benchmarks/ only

from benchmarks.train_step import STAGES, our_step, random_batch, spec_of, timed_s  # noqa: E402
from moelpr.compat import cpu, megatron_fixes  # noqa: E402

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
            f"{stage}: a step takes {found['step_time_s']:.3f} s, metrics add {found['overhead']:+.2%} of wall time, "
            f"{found['overhead_of_cpu_time']:+.2%} of CPU time ({arguments.rounds} rounds; wanted: at most "
            f"{WANTED:.0%})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(stage: Any, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median step time without metrics in seconds, and what metrics add as shares of it."""
    torch.manual_seed(1)
    spec = spec_of(arguments)
    step = our_step(spec, stage, random_batch(spec, arguments.sequences))
    ratios, cpu_ratios, times = [], [], []
    with _logging(stage, step.model, arguments, folder) as log:
        for round_ in range(arguments.rounds + 2):
            order = [True, False] if round_ % 2 else [False, True]
            found = {}
            for with_metrics in order:
                with nullcontext() if with_metrics else _no_counting(stage):
                    found[with_metrics] = timed_s(lambda on=with_metrics: log(step()) if on else step())
            if round_ >= 2:  # the first are warm-up
                ratios.append(found[True][0] / found[False][0] - 1)
                cpu_ratios.append(found[True][1] / found[False][1] - 1)
                times.append(found[False][0])
    return {
        "step_time_s": statistics.median(times),
        "overhead": statistics.median(ratios),
        "overhead_of_cpu_time": statistics.median(cpu_ratios),
    }


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

    def megatrons_log(*_: Any, **__: Any) -> None:
        tracker.routing = tracker._reduce_routing(arguments.layers)
        tracker.routing.log_line()

    run_log = RunLog(stage, EarlyWarnings(stage, Thresholds(), lpr_loss_is_on=stage == "stage2"))
    step_log = StepLog(run_log, tracker, megatrons_log)
    steps = iter(range(1, 10**6))
    with (
        patch.object(global_vars, "_GLOBAL_ARGS", settings),
        patch.object(global_vars, "_GLOBAL_TENSORBOARD_WRITER", SummaryWriter(str(folder))),
        patch.object(run_log, "say", lambda line: None),
    ):
        yield lambda loss: step_log(
            {"lm loss": torch.tensor(loss)}, {}, 1e-5, next(steps), 1.0, False, 0, grad_norm=1.0
        )
    run_log.close()


@contextmanager
def _no_counting(stage: str) -> Iterator[None]:
    from moelpr.model import router

    zero = torch.zeros(())
    with patch.object(router, "routing_vector", lambda *_: zero):
        with patch.object(router, "lpr_loss", lambda *_, **__: zero) if stage == "stage1" else nullcontext():
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
