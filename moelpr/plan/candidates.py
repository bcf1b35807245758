"""The layouts that fit, in order of preference, each with its memory and traffic; or what would have to change."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec
from moelpr.plan.layouts import Layout, legal_layouts
from moelpr.plan.memory import RankMemory, Run, stage_memories
from moelpr.plan.parts import PartSize
from moelpr.plan.ranking import preference, relative_time
from moelpr.plan.traffic import Traffic, expert_traffic

GIB = 1 << 30
# Sizes of clusters that are tried before giving up: up to this many nodes.
_MOST_NODES = 64


@dataclass(frozen=True)
class Cluster:
    """gpu_memory_gib: of one GPU; reserve_gib: the part of it that the rule does not count."""

    gpus: int
    gpus_per_node: int
    gpu_memory_gib: float
    reserve_gib: float

    @property
    def usable_bytes(self) -> float:
        return (self.gpu_memory_gib - self.reserve_gib) * GIB


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    stages: list[RankMemory]  # a rank of each pipeline stage
    traffic: Traffic
    relative_time: float

    @property
    def fullest(self) -> RankMemory:
        return max(self.stages, key=lambda rank: rank.total_bytes)


def fitting(spec: ModelSpec, parts: Sequence[PartSize], run: Run, cluster: Cluster) -> list[Candidate]:
    """The layouts whose fullest rank fits, best first.

    Raises:
        UserError: no layout has that many GPUs, or none fits; the sentence says what would do.
    """
    _check_batch(spec, run)
    found = list(_candidates(spec, parts, run, cluster.gpus, cluster.gpus_per_node))
    if not found:
        raise UserError(_no_layout(spec, run, cluster))
    fits = [candidate for candidate in found if candidate.fullest.total_bytes <= cluster.usable_bytes]
    if not fits:
        raise UserError(_fits_nowhere(spec, parts, run, cluster, found))
    return sorted(
        fits, key=lambda one: preference(one.layout, one.relative_time, cluster.gpus_per_node, one.traffic.total)
    )


def _candidates(
    spec: ModelSpec, parts: Sequence[PartSize], run: Run, gpus: int, gpus_per_node: int
) -> Iterator[Candidate]:
    batch_unit = run.global_batch_size // run.micro_batch_size
    for layout in legal_layouts(spec, gpus, gpus_per_node, batch_unit, run.seq_length):
        memories, traffic = stage_memories(spec, parts, layout, run), expert_traffic(spec, layout, run)
        yield Candidate(layout, memories, traffic, relative_time(spec, parts, layout, run))


def _check_batch(spec: ModelSpec, run: Run) -> None:
    if run.global_batch_size % run.micro_batch_size:
        raise UserError(
            f"--global-batch-size {run.global_batch_size} does not divide into micro-batches of "
            f"{run.micro_batch_size}; change one of them"
        )
    longest = spec.megatron_args["max_position_embeddings"]
    if run.seq_length > longest:
        raise UserError(
            f"--seq-length {run.seq_length} is longer than the model's max_position_embeddings {longest}; "
            f"use at most {longest}"
        )


def _no_layout(spec: ModelSpec, run: Run, cluster: Cluster) -> str:
    unit = run.global_batch_size // run.micro_batch_size

    def works(gpus: int) -> bool:
        return any(legal_layouts(spec, gpus, cluster.gpus_per_node, unit, run.seq_length))

    sizes = _cluster_sizes(cluster.gpus_per_node)
    near = [next(size for size in reversed(sizes) if size < cluster.gpus and works(size))]  # one GPU always works
    near += [size for size in sizes if size > cluster.gpus and works(size)][:1]
    return (
        f"no layout divides the model's layers and heads and {unit} micro-batches per step over {cluster.gpus} GPUs; "
        f"use --gpus {' or '.join(map(str, near))}, or a --global-batch-size that the number of GPUs divides"
    )


def _fits_nowhere(
    spec: ModelSpec, parts: Sequence[PartSize], run: Run, cluster: Cluster, found: list[Candidate]
) -> str:
    least = min(candidate.fullest.total_bytes for candidate in found) / GIB
    remedy = f"give --gpu-memory-gib {_round_up(least + cluster.reserve_gib):g} or more"
    for gpus in _cluster_sizes(cluster.gpus_per_node):
        if gpus > cluster.gpus and any(
            one.fullest.total_bytes <= cluster.usable_bytes
            for one in _candidates(spec, parts, run, gpus, cluster.gpus_per_node)
        ):
            remedy += f", or --gpus {gpus}"
            break
    usable = cluster.usable_bytes / GIB
    return (
        f"on {cluster.gpus} GPUs the leanest layout needs {least:.1f} GiB per rank and {usable:.1f} GiB are usable; "
        f"{remedy}"
    )


def _cluster_sizes(gpus_per_node: int) -> list[int]:
    """A part of a node, then whole nodes."""
    return [*range(1, gpus_per_node), *(gpus_per_node * nodes for nodes in range(1, _MOST_NODES + 1))]


def _round_up(gib: float) -> float:
    return -(-gib * 10 // 1) / 10
