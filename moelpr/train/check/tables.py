"""The tables and the JSON of a dry run."""

from collections import Counter
from typing import Any

from moelpr.base.machine import format_bytes
from moelpr.base.text_tables import table_text
from moelpr.plan.gpus import GIB, GPUS, RESERVED_FRACTION, Cluster, Gpu
from moelpr.plan.memory import model_parts
from moelpr.plan.step_time import expert_traffic, step_time
from moelpr.train.check.cost import disagreements, moved_by_group, seconds, totals
from moelpr.train.check.one_rank import DryRun
from moelpr.train.check.whole_run import Outcome

NOTE = (
    "Not checked: values, contents of checkpoints and corpora, disks, races, kernels' real times, fragmentation, what\n"
    "NCCL and CUDA occupy, and Transformer Engine's kernels, in whose place PyTorch's are counted. Experts are chosen\n"
    "equally often. Times are predicted as the planner's are, and have not been compared with a run."
)


def report(outcome: Outcome, gpu: Gpu, per_node: int) -> str:
    """The tables of all ranks."""
    runs, missing = outcome.runs, outcome.missing
    compared = [*runs, *outcome.witnesses]
    names = ", ".join(str(run.rank) for run in sorted(compared, key=lambda run: run.rank))
    fullest = max(runs, key=lambda run: run.peak_bytes)
    parts = [
        _memory(runs),
        _kernels(runs),
        _waits(runs),
        _collectives(fullest),
        _times(runs, per_node),
        "\n".join(disagreements(compared))
        or f"Ranks {names} launch the collectives that they share in the same order.",
    ]
    if any(len(set(run.live_bytes[1:])) > 1 for run in runs):
        parts.append("warning: memory grows from step to step")
    usable = gpu.memory_gib * (1 - RESERVED_FRACTION) * GIB
    if fullest.peak_bytes > usable:
        parts.append(
            f"warning: rank {fullest.rank} needs {fullest.peak_bytes / GIB:.2f} GiB of the GPU's {gpu.memory_gib:g}, "
            f"of which {RESERVED_FRACTION:.0%} are left for what is not counted"
        )
    if missing:
        parts.append(f"Not here, so not checked: {'; '.join(missing)}.")
    return "\n\n".join([*parts, NOTE])


def numbers(outcome: Outcome, per_node: int) -> dict[str, Any]:
    """The same for programs: bytes, launches, FLOPs and seconds."""
    return {
        "ranks": [_numbers_of(run) for run in outcome.runs],
        "step_seconds": {
            name: {"dry_run": max(seconds(run, gpu, per_node).total for run in outcome.runs), "planner": planned_s}
            for name, gpu in GPUS.items()
            for planned_s in [planned_seconds(outcome.runs, gpu, per_node)]
        },
        "tokens_per_step": outcome.runs[0].tokens_per_step,
        "disagreements": [*disagreements([*outcome.runs, *outcome.witnesses])],
        "not_here": outcome.missing,
        "notes": outcome.notes,
    }


def _numbers_of(run: DryRun) -> dict[str, Any]:
    planned = run.planned and run.planned.memories[run.stage].total_bytes
    kernels = totals(run.counts)
    return {
        "rank": run.rank,
        "pipeline_stage": run.stage,
        "memory_bytes": run.memory,
        "peak_bytes": run.peak_bytes,
        "planned_bytes": planned,
        "live_bytes_after_steps": run.live_bytes,
        "kernels": {kind: {"launches": n, "flops": flops, "bytes": size} for kind, n, flops, size in kernels},
        "waits": dict(run.counts.waits),
        "collectives": [
            {"group": group, "ranks": size, "operation": operator.strip("_"), "launches": number, "bytes": moved}
            for (group, size, operator), (number, moved) in moved_by_group(run.counts).items()
        ],
    }


def planned_seconds(runs: list[DryRun], gpu: Gpu, per_node: int) -> float | None:
    """The planner's step, if it supports the layout."""
    if (run := next((run for run in runs if run.planned), None)) is None:
        return None
    assert run.planned is not None
    cluster = Cluster.of(gpu, run.layout.world_size, per_node)
    plan = run.planned
    return step_time(run.spec, model_parts(run.spec), plan.layout, plan.workload, cluster, plan.memories).total_s


def _memory(runs: list[DryRun]) -> str:
    """GiB of each rank by part, with the planner's sums in the next row."""
    names = list(runs[0].memory)
    rows = []
    for run in runs:
        sizes = [*run.memory.values(), run.peak_bytes]
        rows.append([f"rank {run.rank}", str(run.stage), *(f"{size / GIB:.2f}" for size in sizes)])
        if run.planned:
            plan = run.planned.memories[run.stage]
            weights = ["", f"{plan.parameter_bytes / GIB:.2f}"] if names[0] == "original experts" else []
            others = plan.gradient_bytes, plan.optimizer_bytes, plan.activation_bytes + plan.working_bytes
            rest = [f"{size / GIB:.2f}" for size in (*others, plan.total_bytes)]
            rows.append(["  planner (all weights)", "", *weights, *rest])
    host_bytes = max((plan.host_bytes for run in runs if run.planned for plan in run.planned.memories), default=0)
    host = (
        f"\nUp to {format_bytes(host_bytes)} of the host's memory for the optimizer of each rank." if host_bytes else ""
    )
    return f"GiB at the peak of a step:\n{table_text(['', 'stage', *names, 'total'], rows, [0])}{host}"


def _kernels(runs: list[DryRun]) -> str:
    rows = []
    for run in runs:
        phases = Counter[str]()
        for kernel, number in run.counts.kernels.items():
            phases[kernel.phase] += number
        shares = ", ".join(f"{phase} {number:,}" for phase, number in sorted(phases.items()))
        rows.append([f"rank {run.rank}", "all", f"{phases.total():,}", "", "", shares])
        for kind, launches, flops, num_bytes in totals(run.counts):
            rows.append(["", kind, f"{launches:,}", f"{flops / 1e12:,.2f}", f"{num_bytes / 1e9:,.1f}", ""])
    head = ["", "kernels", "launches", "TFLOP", "GB", ""]
    number = runs[0].num_microbatches
    return f"A step of {number} micro-batch{'es' * (number > 1)}:\n{table_text(head, rows, [0, 1, 5])}"


def _waits(runs: list[DryRun]) -> str:
    places = dict.fromkeys(place for run in runs for place in run.counts.waits if run.counts.waits[place] > 0)
    rows = [[place, *(f"{run.counts.waits[place]:,}" for run in runs)] for place in places]
    return "Waits of the host for the GPU:\n" + table_text(["", *(f"rank {run.rank}" for run in runs)], rows, [0])


def _collectives(run: DryRun) -> str:
    rows = [
        [group, str(size), operator.strip("_"), f"{number:,}", format_bytes(moved)]
        for (group, size, operator), (number, moved) in moved_by_group(run.counts).items()
        if number > 0
    ]
    lines = [f"Collectives of rank {run.rank}, and what it sends in them:"]
    lines.append(table_text(["group", "ranks", "operation", "launches", "bytes"], rows, [0, 2]))
    if run.planned and run.spec.moe:
        plan = expert_traffic(run.spec, run.planned.layout, run.planned.workload)
        lines.append(
            f"Planner: experts exchange {format_bytes(plan.all_to_all)} over EP and {format_bytes(plan.expert_tensor)} "
            "over ETP."
        )
    return "\n".join(lines)


def _times(runs: list[DryRun], per_node: int) -> str:
    rows = []
    ranks = runs[0].layout.world_size
    for name, gpu in GPUS.items():
        slowest = max((seconds(run, gpu, per_node) for run in runs), key=lambda one: one.total)
        planned_s = planned_seconds(runs, gpu, per_node)
        planner = "" if planned_s is None else f"{planned_s:.2f}"
        parts = slowest.products, slowest.memory, slowest.exchanges, slowest.gradients, slowest.bubble, slowest.total
        speed = f"{runs[0].tokens_per_step / slowest.total / ranks:,.0f}"
        rows.append([name, *(f"{part:.2f}" for part in parts), planner, speed])
    head = ["", "products", "memory", "exchanges", "gradients", "bubble", "step", "planner", "tokens/s per GPU"]
    return "Predicted seconds of a step, on the slowest of these ranks:\n" + table_text(head, rows, [0])
