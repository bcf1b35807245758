"""What each step showed, as one record.

Megatron's `training_log` prints and clears a fixed list of MoE metrics once per step on every rank. `MetricsTracker`
is its metrics tracker, `StepLog` wraps `training_log`: the first reduces what the routers counted, the second hands
one record per step to the run's log.
"""

import math
import resource
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.training import get_args
from megatron.training import training as megatron_training
from torch import Tensor

from moelpr.model.router import LPRRouter
from moelpr.model.routing_statistics import RoutingSums
from moelpr.training.early_warnings import EarlyWarnings, Thresholds
from moelpr.training.run_log import RunLog, finite


def install(args: Namespace) -> "StepLog":
    """Put tracker and step log in Megatron's doors; call before pretrain()."""
    thresholds = Thresholds(args.warn_original_rise, args.warn_expert_share, args.warn_lpr_fall, args.warn_window)
    tracker = MetricsTracker()
    set_moe_metrics_tracker(tracker)
    run_log = RunLog(args.stage, EarlyWarnings(args.stage, thresholds, args.lpr_loss_coeff > 0))
    step_log = StepLog(run_log, tracker, megatron_training.training_log)
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
        self.balance_loss = finite(scalars.get("load_balancing_loss"))
        return scalars

    def _reduce_routing(self, num_layers: int) -> RoutingSums:
        """Sum over ranks: each holds its own layers (pipeline) and its own tokens (tensor, context, data)."""
        num_experts = get_args().num_original_experts + get_args().num_experts
        size = RoutingSums.vector_size(num_experts)
        sums = torch.zeros(num_layers, size, device=torch.cuda.current_device())
        for router in self.routers:
            if router.routing_sums is not None:
                sums[router.layer_number - 1] += router.routing_sums
                router.routing_sums = None
        torch.distributed.all_reduce(sums)
        has_router = sums[:, 5:].sum(dim=1) > 0
        return RoutingSums.from_vectors(sums[has_router])


class StepLog:
    """Called in place of Megatron's `training_log`: logs as it does, then writes this step's record."""

    def __init__(self, run_log: RunLog, tracker: MetricsTracker, training_log: Callable[..., Any]) -> None:
        self.run_log, self.tracker, self._training_log = run_log, tracker, training_log
        self._last_time = time.monotonic()

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
        peak_memory_gib = _largest_of_ranks(_peak_memory_gib())
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            now = time.monotonic()
            record = self._record(loss_dict, learning_rate, iteration, grad_norm, step_time_s=now - self._last_time)
            self._last_time = now
            self.run_log.step(record | {"peak_memory_gib": peak_memory_gib})
        return report_memory_flag

    def restart_clock(self) -> None:
        """The next step's time counts from now: what came before was no training."""
        self._last_time = time.monotonic()

    def close(self) -> None:
        """Close what is open and take the log out of Megatron's door again."""
        megatron_training.training_log = self._training_log
        self.run_log.close()

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
            "stage": args.stage,
            "consumed_tokens": args.consumed_train_samples * args.seq_length,
            "learning_rate": learning_rate,
            "grad_norm": finite(grad_norm),
            "step_time_s": round(step_time_s, 4),
            "tokens_per_s": round(step_tokens / step_time_s, 1),
            "lm_loss": finite(loss_dict.get("lm loss")),
            "lm_loss_original": finite(loss_dict.get("lm loss original")),
            "lm_loss_expanded": finite(loss_dict.get("lm loss expanded")),
        }
        if self.tracker.routing is not None:
            record |= self._routing_record(self.tracker.routing)
        return record

    def _routing_record(self, routing: RoutingSums) -> dict[str, Any]:
        return {
            "balance_loss": self.tracker.balance_loss if get_args().balance_loss_coeff else None,
            "lpr_loss": finite(routing.mean_lpr_loss()),
            "router_score": _rounded(routing.mean_scores()),
            "token_share": _rounded(routing.token_shares()),
            "original_first_share_original": _rounded(routing.original_first_share_of_original()),
            "original_first_share_expanded": _rounded(routing.original_first_share_of_expanded()),
        }


def _peak_memory_gib() -> float:
    """The most this rank has held so far: of the GPU's memory in tensors, or of the machine's without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _largest_of_ranks(value: float) -> float:
    largest = torch.tensor(value, device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return round(largest.item(), 3)


def _rounded(values: Tensor) -> Any:
    """Nested lists with five digits, None for NaN."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [None if math.isnan(value) else round(value, 5) for value in values.tolist()]
