"""The trainer as one rank of a cluster: some steps of it, in this process, which can't be used for anything else."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moelpr.base import machine
from moelpr.data import batch
from moelpr.model.model_spec import ModelSpec
from moelpr.plan.layouts import Layout
from moelpr.plan.memory import Routing
from moelpr.train.arguments import kernels
from moelpr.train.arguments.checks import flags, folders
from moelpr.train.arguments.checks.hardware import Planned, as_planned
from moelpr.train.arguments.parse import check_arguments, register_arguments
from moelpr.train.arguments.requested import RequestedRun
from moelpr.train.arguments.settings import RunSettings
from moelpr.train.check import fake_cuda, fake_fla, fake_megatron
from moelpr.train.check.meter import Collective, Counts, Meter


@dataclass(frozen=True)
class DryRun:
    """The launches and the memory of a rank's step."""

    rank: int
    stage: int  # its pipeline stage
    layout: Layout
    spec: ModelSpec
    num_microbatches: int
    tokens_per_step: int
    memory: dict[str, int]  # bytes of its parts; their sum is the peak
    live_bytes: list[int]  # bytes that remain after each step
    counts: Counts  # a step with all its micro-batches
    # The collectives of the start and of the first two steps, of one micro-batch each, as they are launched.
    order: list[Collective]
    planned: Planned | None  # None for what the planner does not support

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


_STEPS = 4


class _Enough(BaseException):
    """Ends the trainer before the first step that is not counted."""


def dry_run(argv: list[str], rank: int, ranks: int, per_node: int, is_witness: bool = False) -> DryRun:
    """Train four steps as this rank: two of one micro-batch, one of those that fill the pipeline, and one of more.

    Counts grow by as much with each further micro-batch, so the last two steps tell those of the whole step. A witness
    makes only the first two, to be compared with other ranks. UserError if the trainer refuses the command line.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(ranks, per_node))}
    os.environ |= {"LOCAL_RANK": str(rank % per_node), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    kernels.is_installed, kernels.has_fla = lambda module: False, lambda: True  # the others can't run without values
    setattr(flags, "is_installed", lambda module: True)  # noqa: B010  # on the cluster
    # This machine's memory and disk are not the cluster's; a size of 0 is unknown.
    setattr(machine, "free_memory", lambda: math.inf)  # noqa: B010
    setattr(folders, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0, total=0)))  # noqa: B010
    fake_cuda.connect(rank, ranks)
    run = check_arguments(argv)
    planned = as_planned(run)
    settings = _without_files(run)
    args = register_arguments(run, settings)
    meter = Meter(number=_route(run))
    fake_megatron.install(meter)
    fake_fla.install(meter)
    if args.bf16_moments:
        fake_megatron.keep_moments_in_bf16(meter)
    steps = _CountedSteps(meter, _micro_batches(run, rank)[: 2 if is_witness else None])
    _train(settings, args, argv, steps)
    return DryRun(
        rank,
        steps.stage,
        run.layout,
        settings.spec,
        _num_microbatches(run),
        run.global_batch_size * args.seq_length,
        steps.memory,
        steps.live_bytes,
        steps.of(_num_microbatches(run)),
        steps.order or meter.order,
        planned,
    )


class _CountedSteps:
    """Megatron's training steps, each of a given number of micro-batches and counted."""

    def __init__(self, meter: Meter, micro_batches: list[int]) -> None:
        self.meter, self.micro_batches = meter, micro_batches
        self.stage = 0
        self.live_bytes: list[int] = []
        self.counts: list[Counts] = []
        self.memory: dict[str, int] = {}
        self.order: list[Collective] = []

    def step(
        self, train_step: Any, forward: Any, iterator: Any, model: Any, optimizer: Any, *others: Any, **named: Any
    ) -> Any:
        from megatron.core import num_microbatches_calculator as calculator
        from megatron.core import parallel_state

        if self.counts:
            self.live_bytes.append(self.meter.live)  # with what the training loop does after a step
        if len(self.counts) == len(self.micro_batches):
            self.memory = _parts(model, optimizer, self.meter.peak)
            self.stage = parallel_state.get_pipeline_model_parallel_rank()
            raise _Enough
        if len(self.counts) == 2:
            self.order.extend(self.meter.order)
        number = self.micro_batches[len(self.counts)]
        self.counts.append(self.meter.start_step())
        with patch.object(calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR, "num_micro_batches", number):
            return train_step(forward, iterator, model, optimizer, *others, **named)

    def of(self, number: int) -> Counts:
        """The counts of a step with this many micro-batches."""
        fewer, more = self.micro_batches[-2:]
        times = (number - fewer) / (more - fewer) if more > fewer else 0
        return self.counts[-2].extrapolated(self.counts[-1], times)


def _train(settings: RunSettings, args: Any, argv: list[str], steps: _CountedSteps) -> None:
    """Run the trainer on weights and batches without values until the steps are counted."""
    from megatron.core import parallel_state
    from megatron.training import training as megatron_training

    from moelpr.train.step_log import StepLog
    from moelpr.train.train import keep_weights, train_stage

    def no_values(*_: Any) -> tuple[Iterator[dict] | None, None, None]:
        args.do_train, args.do_valid, args.do_test = True, False, False
        sample = dict.fromkeys(batch._KEYS, torch.empty(args.micro_batch_size, args.seq_length, dtype=torch.int64))
        return (None if parallel_state.get_tensor_model_parallel_rank() else repeat(sample)), None, None

    megatron_training.train_step = partial(steps.step, megatron_training.train_step)
    megatron_training.build_train_valid_test_data_iterators = no_values
    StepLog.step = lambda *_: None  # type: ignore[method-assign]
    with suppress(_Enough), FakeTensorMode(allow_non_fake_inputs=True), steps.meter:
        train_stage(settings, args, argv, None, keep_weights, None)


def _without_files(run: RequestedRun) -> RunSettings:
    """Settings of a run that reads and writes no files."""
    args = run.args
    settings = replace(RunSettings.of(run), save=None, save_trained_only=False, validation_data={})
    args.save = args.tensorboard_dir = args.validation_data = args.wandb_project = None
    args.mlflow_experiment = args.gpu_sniff_test_interval = None
    args.save_trained_only, args.eval_iters, args.num_workers = False, 0, 0
    # A shorter run would end before the last step that is counted.
    args.train_iters = args.train_iters and max(args.train_iters, _STEPS + 1)
    return settings


def _num_microbatches(run: RequestedRun) -> int:
    return int(run.global_batch_size // (run.args.micro_batch_size * run.layout.dp))


def _micro_batches(run: RequestedRun, rank: int) -> list[int]:
    """Micro-batches of the steps: the third fills what this stage holds; virtual stages need whole pipelines."""
    layout, number = run.layout, _num_microbatches(run)
    unit, full = 1, layout.pp - rank // (run.world_size // layout.pp)
    if layout.vpp > 1:
        unit, full = layout.pp, 2 * layout.pp
    return [min(size, number) for size in (unit, unit, full, full + unit)]


def _route(run: RequestedRun) -> int:
    """Let every expert be chosen equally often; returns the tokens of a rank that choose the original experts."""
    args, layout = run.args, run.layout
    if run.spec is None or run.spec.moe is None:
        return 1
    moe, tokens = run.spec.moe, args.seq_length * args.micro_batch_size // (layout.tp * layout.cp)
    routing = Routing.uniform(moe, args.stage1_experts)
    fake_megatron.route_uniformly(max(1, round(tokens * routing.new_rows / moe.num_new_experts)))
    return max(1, round(tokens * layout.etp * routing.original_rows / moe.num_original_experts))


def _parts(model: list[Any], optimizer: Any, peak: int) -> dict[str, int]:
    """Bytes of what stays from step to step, by what it is, and of what a step adds at its peak."""
    named = [(name, parameter) for chunk in model for name, parameter in chunk.named_parameters()]
    buffers = [one for chunk in model for one in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    seen: set[int] = set()

    def size(tensors: list[Any]) -> int:
        total = 0
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                total += 0 if storage._cdata in seen else storage.nbytes()
                seen.add(storage._cdata)
        return total

    parts = {
        "original experts": size([one for name, one in named if ".original_experts." in name]),
        "other weights": size([one for _, one in named]) + size([buffer.param_data for buffer in buffers]),
        "gradients": size([buffer.grad_data for buffer in buffers]),
    }
    owners = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer]) if one.optimizer]
    state = [one for owner in owners for values in owner.state.values() for one in values.values()]
    masters = [one for owner in owners for group in owner.param_groups for one in group["params"]]
    parts["optimizer"] = size([*state, *masters])
    parts["activations and others"] = peak - sum(parts.values())
    return parts
