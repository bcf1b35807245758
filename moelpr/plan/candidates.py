"""The layouts that fit a cluster and their costs, in order of preference; if none fits, the error says what would."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from moelpr.errors import UserError
from moelpr.layouts import RECOMPUTES, Layout, PlannedLayout, divisors, layout_problems
from moelpr.model_spec import ModelSpec
from moelpr.plan.memory import WEIGHT_BYTES, Parts, RankMemory, Routing, Workload, model_parts, stage_memories
from moelpr.stages import Part

GIB = 1 << 30
_GATE_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for; `reserve_gib` of the memory per GPU stay free."""

    gpus: int
    gpus_per_node: int
    gpu_memory_gib: float
    reserve_gib: float

    @property
    def usable_bytes(self) -> float:
        return (self.gpu_memory_gib - self.reserve_gib) * GIB


class Traffic(NamedTuple):
    """Expert traffic, in bytes per rank and step.

    Attributes:
        all_to_all: rows of new experts sent to other expert-parallel ranks and back, forward and backward.
        expert_tensor: rows received from, and partial results sent to, the other expert-tensor-parallel ranks.
    """

    all_to_all: int
    expert_tensor: int


@dataclass(frozen=True)
class Candidate:
    """A layout with its costs."""

    layout: PlannedLayout
    stages: list[RankMemory]  # of one rank per pipeline stage
    traffic: Traffic
    relative_time: float

    @property
    def peak(self) -> RankMemory:
        """The rank that needs the most memory."""
        return max(self.stages, key=lambda rank: rank.total_bytes)

    def flags(self, workload: Workload) -> list[str]:
        """Command-line arguments for launch/stage1.sh or stage2.sh: the layout, and the batch it was planned for."""
        argv = [*self.layout.flags(), "--micro-batch-size", str(workload.micro_batch_size)]
        argv += ["--global-batch-size", str(workload.global_batch_size), "--seq-length", str(workload.seq_length)]
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
    return sorted(
        fits, key=lambda one: preference(one.layout, one.relative_time, cluster.gpus_per_node, sum(one.traffic))
    )


def legal_layouts(spec: ModelSpec, workload: Workload, cluster: Cluster) -> Iterator[PlannedLayout]:
    """Yield every layout of all GPUs that the trainer accepts and whose tensor-parallel groups stay inside a node.

    Pipeline stages have equally many layers; context parallelism and virtual stages are not planned.
    """
    assert spec.moe is not None
    for tp in (tp for tp in divisors(cluster.gpus) if not leaves_node(tp, cluster.gpus, cluster.gpus_per_node)):
        for pp in divisors(cluster.gpus // tp):
            for ep, etp in itertools.product(divisors(spec.moe.num_new_experts), sorted({1, tp})):
                layout = PlannedLayout(tp, pp, ep, etp, dp=cluster.gpus // (tp * pp))
                if not any(layout_problems(layout, cluster.gpus, spec, *workload.lengths)):
                    yield from (replace(layout, recompute=each) for each in RECOMPUTES)


def leaves_node(group: int, gpus: int, gpus_per_node: int) -> bool:
    """Whether groups of that many neighboring ranks span several nodes."""
    return gpus > gpus_per_node and gpus_per_node % group != 0


def bubble(layout: PlannedLayout, num_microbatches: int) -> float:
    """Fraction of a step that a pipeline stage waits, with the 1F1B schedule."""
    return (layout.pp - 1) / (num_microbatches + layout.pp - 1)


def relative_time(spec: ModelSpec, parts: Parts, layout: PlannedLayout, workload: Workload) -> float:
    """Compute time of a step, relative to the same step without recompute and bubble; communication is not counted.

    Counts multiplications by weights: the forward pass, the gradients of inputs, and the gradients of the weights that
    train (new experts in stage 1; routers are negligible).
    """
    assert spec.moe is not None
    numel = dict.fromkeys(Part, 0)
    for (_, part), part_numel in parts.items():
        numel[part] += part_numel
    one_expert = numel[Part.ORIGINAL_EXPERTS] / spec.moe.num_original_experts  # summed over the MoE layers
    rows = Routing.uniform(spec.moe)
    experts = (rows.original_rows + rows.new_rows) * one_expert
    new_experts = rows.new_rows * one_expert
    others = numel[Part.ATTENTION] + numel[Part.DENSE_FFN]
    output = numel[Part.OUTPUT_LAYER] or numel[Part.EMBEDDING]
    once = 2 * (experts + others + output) + (new_experts if workload.stage == "stage1" else 0)
    again = {"none": 0, "selective": experts, "full": experts + others}[layout.recompute]
    return (once + again) / once / (1 - bubble(layout, workload.num_microbatches(layout)))


def expert_traffic(
    spec: ModelSpec, layout: PlannedLayout, workload: Workload, routing: Routing | None = None
) -> Traffic:
    """The traffic of a rank on the pipeline stage with the most MoE layers.

    A fraction (EP - 1)/EP of the rows of new experts leaves the rank (new experts are chosen equally often). Each row
    is sent with its gate weight in fp32 and returned as a row; the backward pass does the same, and a recomputed MoE
    layer repeats the forward pass. With ETP > 1 each rank gathers the rows of ETP ranks (for the original experts each
    token once, with its m gate weights) and scatters the sums. `routing` is `Routing.uniform` by default.
    """
    assert spec.moe is not None
    routing = routing or Routing.uniform(spec.moe)
    row = spec.megatron_args["hidden_size"] * WEIGHT_BYTES[workload.dtype]
    layers_per_stage = spec.megatron_args["num_layers"] // layout.pp
    moe_layers = max(sum(layer // layers_per_stage == stage for layer in spec.moe.layers) for stage in range(layout.pp))
    passes = 2 if layout.recompute == "none" else 3
    times = workload.num_microbatches(layout) * moe_layers * passes
    tokens = workload.seq_length * workload.micro_batch_size / layout.tp
    new = tokens * routing.new_rows * (row + _GATE_WEIGHT_BYTES + row)
    original = tokens * (row + spec.moe.num_original_experts * _GATE_WEIGHT_BYTES + row)
    return Traffic(
        all_to_all=round(times * new * (layout.ep - 1) / layout.ep),
        expert_tensor=round(times * (new + original) * (layout.etp - 1)),
    )


def preference(layout: PlannedLayout, time: float, gpus_per_node: int, traffic_bytes: float) -> tuple[float, ...]:
    """Sort key among layouts that fit; the smallest is recommended. A rule of thumb, not a measurement.

    In this order: the smallest `relative_time` in steps of 1/20 (smaller differences are decided by communication);
    experts exchanged inside a node; the model divided over as few ranks as possible; pipeline before tensor
    parallelism, because a pipeline stage sends one tensor where tensor parallelism exchanges one per layer; the fewest
    bytes of expert traffic; the least time.
    """
    expert_ranks = layout.ep * layout.etp
    leaves = leaves_node(expert_ranks, layout.world_size, gpus_per_node)
    return round(20 * time), leaves, layout.tp * layout.pp, layout.tp, traffic_bytes, expert_ranks, time


def _candidates(spec: ModelSpec, workload: Workload, cluster: Cluster) -> Iterator[Candidate]:
    parts = model_parts(spec)
    for layout in legal_layouts(spec, workload, cluster):
        memories, traffic = stage_memories(spec, parts, layout, workload), expert_traffic(spec, layout, workload)
        yield Candidate(layout, memories, traffic, relative_time(spec, parts, layout, workload))


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
    enough_gib = -(-(least + cluster.reserve_gib) * 10 // 1) / 10
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
