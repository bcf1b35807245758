"""The layouts that fit a cluster and their costs, in order of preference; if none fits, the error says what would."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moelpr.layouts import RECOMPUTES, Layout, PlannedLayout, divisors, layout_problems
from moelpr.model_spec import ModelSpec
from moelpr.plan.gpus import GIB, RESERVED_FRACTION, Cluster
from moelpr.plan.memory import RankMemory, Workload, model_parts, stage_memories
from moelpr.plan.step_time import StepTime, Traffic, expert_traffic, relative_time, step_time
from moelpr.process.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A layout with its costs; `step_time` is None for GPUs that the planner does not know."""

    layout: PlannedLayout
    stages: list[RankMemory]  # one rank of each pipeline stage
    traffic: Traffic
    relative_time: float
    step_time: StepTime | None

    @property
    def peak(self) -> RankMemory:
        """The rank that needs the most memory."""
        return max(self.stages, key=lambda rank: rank.total_bytes)

    def flags(self, workload: Workload) -> list[str]:
        """Command-line arguments for the stage's launcher: the layout, and the batch it was planned for."""
        argv = [*self.layout.flags(), "--micro-batch-size", str(workload.micro_batch_size)]
        argv += ["--global-batch-size", str(workload.global_batch_size), "--seq-length", str(workload.seq_length)]
        argv += ["--train-new-embeddings"] if workload.new_embeddings else []
        return [*argv, "--fp32"] if workload.dtype == "fp32" else argv


def fitting(spec: ModelSpec, workload: Workload, cluster: Cluster) -> list[Candidate]:
    """The layouts whose highest-memory rank fits, best first.

    Raises:
        UserError: no layout has that many GPUs, or none fits; the message names values that work.
    """
    if problem := next(layout_problems(Layout(), 1, spec, *workload.lengths), None):
        raise UserError(problem)  # true of every layout
    found = list(_candidates(spec, workload, cluster))
    if not found:
        raise UserError(_no_layout(spec, workload, cluster))
    fits = [candidate for candidate in found if candidate.peak.total_bytes <= cluster.usable_bytes]
    if not fits:
        raise UserError(_too_little_memory(spec, workload, cluster, found))
    fastest_s = min(one.step_time.total_s if one.step_time else 1 for one in fits)

    def key(one: Candidate) -> tuple[float, ...]:
        time = one.step_time.total_s / fastest_s if one.step_time else one.relative_time
        return preference(one.layout, time, cluster, sum(one.traffic))

    return sorted(fits, key=key)


def with_larger_micro_batch(
    best: Candidate, spec: ModelSpec, workload: Workload, cluster: Cluster
) -> tuple[Candidate, Workload]:
    """The best layout and the workload after doubling the micro-batch as long as that is predicted to be faster."""
    while best.step_time and 2 * workload.micro_batch_size <= workload.global_batch_size:
        doubled = replace(workload, micro_batch_size=2 * workload.micro_batch_size)
        try:
            other = fitting(spec, doubled, cluster)[0]
        except UserError:  # it fits in no layout
            break
        if other.step_time is None or other.step_time.total_s >= best.step_time.total_s:
            break
        best, workload = other, doubled
    return best, workload


def legal_layouts(spec: ModelSpec, workload: Workload, cluster: Cluster) -> Iterator[PlannedLayout]:
    """Yield every layout of all GPUs that the trainer accepts and whose tensor-parallel groups stay inside a node.

    Pipeline stages have equally many layers; context parallelism and virtual stages are not planned.
    """
    assert spec.moe is not None
    for tp in (tp for tp in divisors(cluster.gpus) if not cluster.leaves_node(tp)):
        for pp in divisors(cluster.gpus // tp):
            for ep, etp in itertools.product(divisors(spec.moe.num_new_experts), sorted({1, tp})):
                layout = PlannedLayout(tp, pp, ep, etp, dp=cluster.gpus // (tp * pp))
                if not any(layout_problems(layout, cluster.gpus, spec, *workload.lengths)):
                    yield from (replace(layout, recompute=each) for each in RECOMPUTES)


def preference(layout: PlannedLayout, time: float, cluster: Cluster, traffic_bytes: float) -> tuple[float, ...]:
    """Sort key among layouts that fit; the smallest is recommended. A rule of thumb, not a measurement.

    In this order: the smallest `time`, predicted or of compute alone, in steps of 1/20 (smaller differences are below
    the error of predictions, or decided by communication); experts exchanged inside a node; the model divided over as
    few ranks as possible; pipeline before tensor parallelism, because a pipeline stage sends one tensor where tensor
    parallelism exchanges one per layer; the fewest bytes of expert traffic; the least time.
    """
    expert_ranks = layout.ep * layout.etp
    leaves = cluster.leaves_node(expert_ranks)
    return round(20 * time), leaves, layout.tp * layout.pp, layout.tp, traffic_bytes, expert_ranks, time


def _candidates(spec: ModelSpec, workload: Workload, cluster: Cluster) -> Iterator[Candidate]:
    parts = model_parts(spec)
    for layout in legal_layouts(spec, workload, cluster):
        memories = stage_memories(spec, parts, layout, workload)
        yield Candidate(
            layout,
            memories,
            expert_traffic(spec, layout, workload),
            relative_time(spec, parts, layout, workload),
            step_time(spec, parts, layout, workload, cluster, memories) if cluster.gpu else None,
        )


def _no_layout(spec: ModelSpec, workload: Workload, cluster: Cluster) -> str:
    smaller, larger = (
        (str(one.gpus) for one in clusters if any(legal_layouts(spec, workload, one)))
        for clusters in _other_sizes(cluster)
    )
    near = [next(smaller), *itertools.islice(larger, 1)]  # one GPU always works
    micro_batches = workload.global_batch_size // workload.micro_batch_size
    return (
        f"no layout divides the model's layers and heads and {micro_batches} micro-batches per step over "
        f"{cluster.gpus} GPUs; use --gpus {' or '.join(near)}, or a --global-batch-size that is a multiple "
        "of the number of GPUs"
    )


def _too_little_memory(spec: ModelSpec, workload: Workload, cluster: Cluster, found: list[Candidate]) -> str:
    least = min(candidate.peak.total_bytes for candidate in found) / GIB
    enough_gib = math.ceil(max(least + cluster.reserve_gib, least / (1 - RESERVED_FRACTION)) * 10) / 10
    fix = f"use --gpu-memory-gib {enough_gib:g} or more"
    for larger in _other_sizes(cluster)[1]:
        if any(one.peak.total_bytes <= cluster.usable_bytes for one in _candidates(spec, workload, larger)):
            fix += f", or --gpus {larger.gpus}"
            break
    return (
        f"no layout fits on {cluster.gpus} GPUs: the smallest needs {least:.1f} GiB per rank and "
        f"{cluster.usable_bytes / GIB:.1f} GiB are usable; {fix}"
    )


def _other_sizes(cluster: Cluster) -> tuple[list[Cluster], list[Cluster]]:
    """Smaller and larger clusters, nearest first: part of a node, and up to 64 full nodes."""
    node = cluster.gpus_per_node
    sizes = [replace(cluster, gpus=gpus) for gpus in [*range(1, node), *range(node, 64 * node + 1, node)]]
    smaller = [size for size in reversed(sizes) if size.gpus < cluster.gpus]
    return smaller, [size for size in sizes if size.gpus > cluster.gpus]
