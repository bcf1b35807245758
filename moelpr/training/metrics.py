"""What each step showed: metrics.jsonl, TensorBoard, the log line and a progress bar with the time left.

Megatron's `training_log` prints and clears a fixed list of MoE metrics once per step on every rank. `MetricsTracker`
is its metrics tracker, `StepLog` wraps `training_log`: the first reduces what the routers counted, the second writes
one record per step.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.training import get_args, get_tensorboard_writer
from megatron.training import training as megatron_training
from torch import Tensor
from tqdm import tqdm

from moelpr.model.router import LPRRouter
from moelpr.model.routing_statistics import RoutingSums


def install(stage: str) -> "StepLog":
    """Put tracker and step log in Megatron's doors; call before pretrain()."""
    tracker = MetricsTracker()
    set_moe_metrics_tracker(tracker)
    step_log = StepLog(stage, tracker, megatron_training.training_log)
    megatron_training.training_log = step_log
    return step_log


class MetricsTracker(MoEMetricsTracker):
    """Megatron's tracker plus what the routers counted. Every rank calls `report` once per step."""

    def __init__(self) -> None:
        super().__init__()
        self.routers: list[LPRRouter] = []  # this rank's, filled by watch()
        self.routing: RoutingSums | None = None  # of the last step, over all ranks and micro-batches
        self.balance_loss: float | None = None

    def watch(self, model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        self.routers = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, LPRRouter)]
        return model_chunks

    def report(self, *args: Any, **kwargs: Any) -> str:
        log_line = super().report(*args, **kwargs)
        self.routing = self._reduce_routing(kwargs["num_layers"])
        return log_line + self.routing.log_line()

    def ensure_initialized(self, *args: Any, **kwargs: Any) -> None:
        """Also tell a pipeline stage without routers over which ranks the others' losses are summed or averaged.

        Megatron's leaves that out, and such a last stage then logs the share of one tensor-parallel rank.
        """
        super().ensure_initialized(*args, **kwargs)
        group = parallel_state.get_tensor_and_context_parallel_group()
        for name, entry in self._metrics.items():
            if name == "z_loss":  # each rank's is a mean already
                entry.avg_group = entry.avg_group or group
            else:
                entry.reduce_group = entry.reduce_group or group

    def _aggregate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        scalars = super()._aggregate(*args, **kwargs)
        self.balance_loss = _number(scalars.get("load_balancing_loss"))
        return scalars

    def _reduce_routing(self, num_layers: int) -> RoutingSums:
        """Sum over ranks: each holds its own layers (pipeline) and its own tokens (tensor, context, data)."""
        num_experts = get_args().num_original_experts + get_args().num_experts
        sums = torch.zeros(num_layers, 5 + num_experts, device=torch.cuda.current_device())
        for router in self.routers:
            if router.routing_sums is not None:
                sums[router.layer_number - 1] += router.routing_sums
                router.routing_sums = None
        torch.distributed.all_reduce(sums)
        has_router = sums[:, 5:].sum(dim=1) > 0
        return RoutingSums.from_vectors(sums[has_router])


class StepLog:
    """Called in place of Megatron's `training_log`: logs as it does, then writes this step's record."""

    def __init__(self, stage: str, tracker: MetricsTracker, training_log: Callable[..., Any]) -> None:
        self.stage, self.tracker, self._training_log = stage, tracker, training_log
        self._file: TextIO | None = None
        self._bar: tqdm | None = None
        self._last_time = self._first_time = time.monotonic()
        self._steps_before = 0

    def __call__(
        self,
        loss_dict: dict[str, Tensor],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        report_memory_flag = self._training_log(
            loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter,
            grad_norm, *args, **kwargs,
        )  # fmt: skip
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            now = time.monotonic()
            record = self._record(loss_dict, learning_rate, iteration, grad_norm, step_time_s=now - self._last_time)
            self._last_time = now
            self._write(record)
        return report_memory_flag

    def close(self) -> None:
        """Close what is open and take the log out of Megatron's door again."""
        megatron_training.training_log = self._training_log
        for thing in (self._file, self._bar):
            if thing is not None:
                thing.close()

    def _record(
        self,
        loss_dict: dict[str, Tensor],
        learning_rate: float | None,
        iteration: int,
        grad_norm: float | None,
        step_time_s: float,
    ) -> dict[str, Any]:
        args = get_args()
        step_tokens = args.micro_batch_size * args.data_parallel_size * get_num_microbatches() * args.seq_length
        record = {
            "iteration": iteration,
            "stage": self.stage,
            "consumed_tokens": args.consumed_train_samples * args.seq_length,
            "learning_rate": learning_rate,
            "grad_norm": _number(grad_norm),
            "step_time_s": round(step_time_s, 4),
            "tokens_per_s": round(step_tokens / step_time_s, 1),
            "lm_loss": _number(loss_dict.get("lm loss")),
            "lm_loss_original": _number(loss_dict.get("lm loss original")),
            "lm_loss_expanded": _number(loss_dict.get("lm loss expanded")),
        }
        if self.tracker.routing is not None:
            record |= self._routing_record(self.tracker.routing)
        return record

    def _routing_record(self, routing: RoutingSums) -> dict[str, Any]:
        return {
            "balance_loss": self.tracker.balance_loss if get_args().balance_loss_coeff else None,
            "lpr_loss": _number(routing.mean_lpr_loss()),
            "router_score": _rounded(routing.mean_scores()),
            "original_first_share_original": _rounded(routing.original_first_share_of_original()),
            "original_first_share_expanded": _rounded(routing.original_first_share_of_expanded()),
        }

    def _write(self, record: dict[str, Any]) -> None:
        args = get_args()
        if args.save and self._file is None:
            Path(args.save).mkdir(parents=True, exist_ok=True)
            self._file = open_metrics(Path(args.save) / "metrics.jsonl", before_iteration=record["iteration"])
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        _write_to_tensorboard(record)
        self._show_progress(record, args.train_iters, args.log_interval)

    def _show_progress(self, record: dict[str, Any], total: int, log_interval: int) -> None:
        """On stderr, beside Megatron's log: a bar with the time left on a terminal, else a line per log interval."""
        if self._bar is None:
            done_before = record["iteration"] - 1
            self._bar = tqdm(
                total=total, initial=done_before, desc=self.stage, unit="step", dynamic_ncols=True, disable=None
            )
            self._steps_before, self._first_time = done_before, time.monotonic() - record["step_time_s"]
        values = {"loss": "lm_loss", "balance": "balance_loss", "LPR": "lpr_loss", "tokens/s": "tokens_per_s"}
        shown = {name: f"{record[key]:.4g}" for name, key in values.items() if record.get(key) is not None}
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
        elif record["iteration"] % log_interval == 0 or record["iteration"] == total:
            steps = record["iteration"] - self._steps_before
            left_s = (time.monotonic() - self._first_time) / steps * (total - record["iteration"])
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = tqdm.format_interval(left_s)
            print(f"{self.stage} {record['iteration']}/{total}  {words}  {left} left", file=sys.stderr, flush=True)


def open_metrics(path: Path, before_iteration: int) -> TextIO:
    """Open metrics.jsonl for appending, without the records of steps that a resumed run is about to repeat."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["iteration"] >= before_iteration:
                    break
            except ValueError:
                break  # half-written by a killed run
            kept.append(line + "\n")
        path.write_text("".join(kept))
    return open(path, "a")


def _write_to_tensorboard(record: dict[str, Any]) -> None:
    """Scalars that Megatron does not write itself, per-layer values as one tag each."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    step = record["iteration"]
    if record.get("lpr_loss") is not None:
        writer.add_scalar("lpr loss", record["lpr_loss"], step)
    for key in ("original_first_share_original", "original_first_share_expanded"):
        for layer, value in enumerate(record.get(key) or []):
            if value is not None:
                writer.add_scalar(f"{key}/moe layer {layer}", value, step)
    for layer, scores in enumerate(record.get("router_score") or []):
        for expert, value in enumerate(scores):
            if value is not None:
                writer.add_scalar(f"router score, moe layer {layer}/expert {expert}", value, step)


def _number(value: Any) -> float | None:
    """A plain float; None for nothing and for NaN (a mean over no tokens), which JSON does not have."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def _rounded(values: Tensor) -> Any:
    """Nested lists with five digits, None for NaN."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [None if math.isnan(value) else round(value, 5) for value in values.tolist()]
