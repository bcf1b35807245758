"""This machine's GPUs, which PyTorch can use, and its memory, next to what the planner expects of the run."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moelpr.base import machine, ranks, stop
from moelpr.model.megatron import cpu
from moelpr.model.stages import DENSE_STAGES
from moelpr.plan.gpus import RESERVED_FRACTION
from moelpr.plan.layouts import PlannedLayout, layout_problems
from moelpr.plan.memory import (
    CPU,
    GRADIENT_BYTES,
    PROCESS_BYTES,
    Dtype,
    Kernels,
    RankMemory,
    Workload,
    model_parts,
    stage_memories,
)
from moelpr.train.arguments.checks.layout import is_uneven, uneven_ends
from moelpr.train.arguments.requested import RequestedRun


def check_gpus(run: RequestedRun) -> Iterable[str]:
    """Otherwise a run for GPUs would silently use the CPU."""
    if problem := cpu.unusable_gpus():
        yield problem
    for name in ("gpu_sniff_test_interval", "log_straggler"):
        if getattr(run.args, name) and cpu.is_needed():
            yield f"{run.flag(name)} measures GPUs, and this machine has none; remove it"
    if run.args.enable_ft_package and not (run.args.save and stop.FT_LAUNCHER_VARIABLE in os.environ):
        yield "--enable-ft-package requires --save and a start by NVRx's ft_launcher (docs/running.md); remove it"


def note_memory(run: RequestedRun) -> Iterable[str]:
    """The planner expects a rank to need more than its GPU has, or the ranks more than a machine without GPUs has."""
    if (expected := expected_memory(run)) is None:
        return
    fix = "use a smaller --micro-batch-size, --recompute-granularity, or a layout of moelpr layouts"
    if not cpu.is_needed():
        total = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
        if expected > (1 - RESERVED_FRACTION) * total:
            yield (
                f"warning: a rank may need {machine.format_bytes(expected)}, and a GPU here has "
                f"{machine.format_bytes(total)}, of which {RESERVED_FRACTION:.0%} are left for what is not counted; if "
                f"it runs out of memory, {fix}"
            )
    elif (number := ranks.local_world_size()) * expected > (free := machine.free_memory()):
        # The kernel would kill a rank, where a GPU reports an error.
        yield (
            f"warning: this machine has {machine.format_bytes(free)} of free memory, and {number} ranks of "
            f"{machine.format_bytes(expected)} may need more; if one is killed, {fix}"
        )


def note_host_memory(run: RequestedRun) -> Iterable[str]:
    """The optimizer's state does not fit in the memory of this machine, which has GPUs."""
    if cpu.is_needed() or (planned := as_planned(run)) is None:
        return
    needed, number = max(rank.host_bytes for rank in planned.memories), ranks.local_world_size()
    if number * needed > (free := machine.free_memory()):
        yield (
            f"warning: --optimizer-cpu-offload needs up to {machine.format_bytes(needed)} of this machine's memory for "
            f"each of {number} ranks, and {machine.format_bytes(free)} are free; if one is killed, train fewer "
            "experts, or use more machines"
        )


def expected_memory(run: RequestedRun) -> int | None:
    """Bytes of the rank that needs the most; None for invalid settings and for what moelpr.plan does not support."""
    if (planned := as_planned(run)) is None:
        return None
    if cpu.is_needed():
        return max(rank.total_bytes + rank.host_bytes for rank in planned.memories) + PROCESS_BYTES
    return max(rank.total_bytes for rank in planned.memories)


@dataclass(frozen=True)
class Planned:
    """A run for the planner's formulas, and the memory that they expect of a rank of each pipeline stage."""

    layout: PlannedLayout
    workload: Workload
    memories: list[RankMemory]


def as_planned(run: RequestedRun) -> Planned | None:
    """The run for the planner's formulas; None for invalid settings and for what they do not support."""
    args, layout, spec = run.args, run.layout, run.spec
    ends = uneven_ends(run)
    if (
        spec is None
        or args.stage is None
        or (args.stage in DENSE_STAGES) != (spec.moe is None)
        or layout.cp > 1
        or (is_uneven(run) and (ends is None or layout.vpp > 1))
    ):
        return None
    sizes = args.seq_length, args.micro_batch_size, run.global_batch_size
    problems = layout_problems(
        layout, run.world_size, spec, *sizes, even_pipeline=ends is None, torch_grouped_gemm=False
    )
    if not all(size and size > 0 for size in sizes) or any(problems):
        return None
    if ends is None and spec.megatron_args["num_layers"] % (layout.pp * layout.vpp):
        return None
    sizes_of_layout = layout.tp, layout.pp, layout.ep, layout.etp, layout.dp
    is_distributed = bool(args.use_distributed_optimizer)
    granularity, has_moe = args.recompute_granularity, "moe" in (args.recompute_modules or [])
    recompute = granularity if granularity == "full" or (granularity == "selective" and has_moe) else "none"
    trades: Any = {"recompute": recompute, "distributed_optimizer": is_distributed, "ends": ends}
    planned_layout = PlannedLayout(*sizes_of_layout, vpp=layout.vpp, **trades)
    dtype: Dtype = "bf16" if args.bf16 or args.fp16 else "fp32"
    kernels = CPU if cpu.is_needed() else Kernels()
    trains = args.train_new_embeddings, args.train_everything, args.stage1_experts, bool(args.optimizer_cpu_offload)
    gradient_bytes = 2 if args.grad_reduce_in_bf16 else GRADIENT_BYTES
    workload = Workload(args.stage, *sizes, dtype, kernels, *trains, gradient_bytes, args.bf16_moments)
    return Planned(planned_layout, workload, stage_memories(spec, model_parts(spec), planned_layout, workload))
