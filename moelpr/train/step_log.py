"""The metrics of each training step, as one record.

`MetricsTracker` is Megatron's MoE metrics tracker; it also reduces what the routers counted. `StepLog` turns the values
that Megatron logs and the tracker's into one record per step, and passes it to the run's log.
"""

import argparse
import math
import resource
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.core.utils import get_model_config
from torch import Tensor

from moelpr.base import ranks
from moelpr.base.run_folder import as_step
from moelpr.model.layers.router import Decisions, LPRRouter
from moelpr.model.megatron import hooks
from moelpr.model.metrics import schema
from moelpr.model.metrics.routing_sums import RoutingSums
from moelpr.train.arguments.settings import RunSettings
from moelpr.train.early_warnings import EarlyWarnings
from moelpr.train.forward_step import ForwardClock
from moelpr.train.run_log import RunLog, finite
from moelpr.train.track.trackers import TRACKERS
from moelpr.train.track.tracking import Tracking


@contextmanager
def logs_steps(settings: RunSettings, args: argparse.Namespace) -> Iterator["StepLog"]:
    """Log the steps that Megatron trains, whose `args` count steps and samples."""
    tracker = MetricsTracker()
    set_moe_metrics_tracker(tracker)
    stage = settings.stage
    masked = settings.spec.moe.num_original_places if settings.spec.moe and stage.stage1_experts == "new" else 0
    warnings = EarlyWarnings(stage.name, stage.lpr_loss_coeff > 0, masked, settings.grace_s)
    run_log = RunLog(settings, warnings, lambda is_new: _tracking(settings, args, is_new))
    log = StepLog(run_log, tracker, args)
    with closing(run_log), hooks.after_training_log(log.step), hooks.after_step_is_written(log.step_is_written):
        yield log


def _tracking(settings: RunSettings, args: argparse.Namespace, is_new: bool) -> Tracking | None:
    """The client of the trackers, whose step numbers continue those of the stage before; None without trackers."""
    start = settings.start
    if settings.save is None or not any(getattr(args, flag) for flag in TRACKERS):
        return None
    steps = 0 if start.is_resumed else as_step(start.step_folder.name.removeprefix("iter_")) or 0
    return Tracking(args, settings.save, start.pretrained, steps, is_new=is_new)


class MetricsTracker(MoEMetricsTracker):
    """Megatron's tracker plus what the routers counted. Every rank calls `report` once per step."""

    def __init__(self) -> None:
        super().__init__()
        self.routers: list[LPRRouter] = []  # this rank's, set by `watch`
        self.decisions = Decisions(0)  # theirs, of one micro-batch
        self.num_places = 0  # E, the router's rows, set by `watch`
        self.routing: RoutingSums | None = None  # the last step's, over all ranks and micro-batches
        self.balance_loss: float | None = None  # the last step's

    def watch(self, model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        self.routers = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, LPRRouter)]
        self.decisions = Decisions(len(self.routers))
        for router in self.routers:
            router.decisions = self.decisions
        config = get_model_config(model_chunks[0])
        if config.num_moe_experts is not None:
            self.num_places = config.num_original_places + config.num_moe_experts
        return model_chunks

    def report(self, *args: Any, **kwargs: Any) -> str:
        self.routing = self.reduce_routing(kwargs["num_layers"])
        return super().report(*args, **kwargs)

    def _aggregate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        scalars = super()._aggregate(*args, **kwargs)
        self.balance_loss = finite(scalars.get("load_balancing_loss"))
        return scalars

    def reduce_routing(self, num_layers: int) -> RoutingSums:
        """Sum over ranks: each has its own layers (pipeline) and its own tokens (tensor, context, data)."""
        sums = torch.zeros(num_layers, RoutingSums.vector_size(self.num_places), device=torch.cuda.current_device())
        self.decisions.add_up()
        for router in self.routers:
            if router.routing_sums is not None:
                sums[router.layer_number - 1] += router.routing_sums
                router.routing_sums = None
        torch.distributed.all_reduce(sums)
        layers = RoutingSums.from_vectors(sums.cpu())  # each number that is read would wait for the GPU
        has_router = layers.tokens.sum(dim=1) > 0  # scores may be NaN
        return RoutingSums(*(field[has_router] for field in layers))


class StepLog:
    """Makes one record per step on the last rank; every rank calls `step`."""

    def __init__(self, run_log: RunLog, tracker: MetricsTracker, args: argparse.Namespace) -> None:
        self.run_log, self.tracker, self.args, self.clock = run_log, tracker, args, ForwardClock()
        self._last_time = time.monotonic()
        self._longest_step_s = 0.0
        self._is_delayed = True  # whether the step contains other work: the start, or a checkpoint

    def step(
        self, loss_dict: dict[str, Tensor], learning_rate: float | None, iteration: int, grad_norm: float | None
    ) -> None:
        """Write the record of a step that Megatron has just logged."""
        peak_memory_gib, forward_s = _of_ranks(self.clock.take_s())
        if not ranks.is_last_rank():
            return
        now = time.monotonic()
        step_time_s, self._last_time = now - self._last_time, now
        if not self._is_delayed:
            self._longest_step_s = max(self._longest_step_s, step_time_s)
        self._is_delayed = False
        args = self.args
        step_tokens = args.micro_batch_size * args.data_parallel_size * get_num_microbatches() * args.seq_length
        record = {
            "iteration": iteration,
            "stage": args.stage,
            schema.CONSUMED_TOKENS: args.consumed_train_samples * args.seq_length,
            schema.LEARNING_RATE: learning_rate,
            schema.GRAD_NORM: finite(grad_norm),
            schema.STEP_TIME_S: round(step_time_s, 4),
            schema.TOKENS_PER_S: round(step_tokens / step_time_s, 1),
        }
        losses = {"": "lm loss", "original": "lm loss original", "expanded": "lm loss expanded"}  # Megatron's names
        record |= {schema.LM_LOSS_OF[group]: finite(loss_dict.get(name)) for group, name in losses.items()}
        if (routing := self.tracker.routing) is not None:
            record |= {
                schema.BALANCE_LOSS: self.tracker.balance_loss if args.balance_loss_coeff else None,
                schema.LPR_LOSS: finite(routing.mean_lpr_loss()),
                schema.ROUTER_SCORE: _rounded(routing.router_scores()),
                schema.TOKEN_SHARE: _rounded(routing.token_shares()),
            }
            for share in schema.ROUTING_SHARES:
                of_groups = getattr(routing, share)().unbind(dim=1)
                record |= {f"{share}_{g}": _rounded(of) for g, of in zip(schema.GROUP_NAMES, of_groups, strict=True)}
        times = {"min": forward_s.min(), "mean": forward_s.mean(), "max": forward_s.max()}
        record |= {f"forward_time_s_{which}": round(value.item(), 4) for which, value in times.items()}
        self.run_log.write(record | {schema.PEAK_MEMORY_GIB: peak_memory_gib})
        if ranks.world_size() > ranks.local_world_size():
            node = slowest_node(forward_s, args.pipeline_model_parallel_size, ranks.local_world_size())
            self.run_log.warn(iteration, self.run_log.early_warnings.timed(*node))

    def step_is_written(self, _: Path, seconds: float) -> None:
        """Warn on the last rank if a run that is asked to stop may be killed before this is done again."""
        self._is_delayed = True
        if ranks.is_last_rank():
            warnings = self.run_log.early_warnings.saved(self._longest_step_s, seconds)
            self.run_log.warn(self.args.curr_iteration + 1, warnings)

    def restart_clock(self) -> None:
        """Measure the next step's time from now on, because the time until now was not spent on training."""
        self._last_time = time.monotonic()
        self.clock.take_s()


def _of_ranks(forward_s: float) -> tuple[float, Tensor]:
    """The ranks' highest peak memory so far in GiB, and each rank's time in its forward passes, by one sum of ranks.

    The memory is that of tensors on the GPU, or the process's resident memory without a GPU.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    numbers = torch.zeros(1 + ranks.world_size())
    numbers[0], numbers[1 + ranks.rank()] = peak, forward_s
    numbers = numbers.to(torch.cuda.current_device())
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    numbers = numbers.cpu()
    return round(numbers[0].item(), 3), numbers[1:]


def slowest_node(times: Tensor, pipeline_stages: int, ranks_per_node: int) -> tuple[int, float]:
    """The node whose ranks take the longest, and how many times as long as the median rank of their pipeline stage."""
    of_stages = times.view(pipeline_stages, -1)
    ratios = of_stages / of_stages.median(dim=1, keepdim=True).values.clamp(min=1e-9)
    nodes = [of_node.mean().item() for of_node in ratios.flatten().split(ranks_per_node)]
    return max(enumerate(nodes), key=lambda node: node[1])


def _rounded(values: Tensor) -> Any:
    """Nested lists with five decimals, None for NaN."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [None if math.isnan(value) else round(value, 5) for value in values.tolist()]
