"""The cost of a rank's launches on a GPU, and differences between the collectives of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import Any

from moelpr.plan.gpus import Gpu
from moelpr.plan.step_time import LINK_EFFICIENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, host_update_s
from moelpr.train.check.meter import Collective, Counts
from moelpr.train.check.one_rank import DryRun

# The kinds of kernels, by what their operators start with; the first that fits counts.
_KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "products of experts": ("_grouped_mm",),
    "attention": ("_scaled_dot", "_flash_attention", "_efficient_attention", "_varlen_attn"),
    "linear attention": ("chunk_gated_delta_rule", "causal_conv1d", "l2norm"),
    "compiled": ("compiled",),
    "copies": ("copy_", "_to_copy", "clone", "cat", "constant_pad"),
    "rows": ("index", "gather", "scatter", "embedding", "nonzero", "sort", "masked_select"),
    "optimizer": ("_fused_adam", "_foreach"),
}


@dataclass(frozen=True)
class Seconds:
    """The predicted time of a step, of which nothing but the gradients' collectives overlaps with kernels."""

    products: float
    memory: float
    exchanges: float
    gradients: float
    bubble: float

    @property
    def total(self) -> float:
        return self.products + self.memory + self.exchanges + self.gradients + self.bubble


def seconds(run: DryRun, gpu: Gpu, per_node: int) -> Seconds:
    """Predict a step's time by the data sheet and the planner's fractions of its rates."""
    flops, memory = gpu.flops * MATMUL_EFFICIENCY, gpu.memory_bandwidth * MEMORY_EFFICIENCY
    products = other = exchanges = gradients = 0.0
    for kernel, number in run.counts.kernels.items():
        if kernel.flops:
            products += number * max(kernel.flops / flops, kernel.num_bytes / memory)
        else:
            other += number * kernel.num_bytes / memory
    for collective, number in run.counts.collectives.items():
        time_s, group = number * _collective_s(collective, run.rank, gpu, per_node), collective.group.name
        # It reduces gradients or gathers weights, which overlaps with a micro-batch's work.
        if "DATA_PARALLEL" in group and "TENSOR_AND" not in group:
            gradients += time_s
        else:
            exchanges += time_s
    each = (products + other + exchanges) / run.num_microbatches
    waits = (run.layout.pp - 1) / run.layout.vpp * each
    if run.planned is not None:  # the optimizer's state may be on the host
        other += host_update_s(run.planned.memories[run.stage])
    return Seconds(products, other, exchanges, max(0.0, gradients - each), waits)


def _collective_s(collective: Collective, rank: int, gpu: Gpu, per_node: int) -> float:
    members = collective.group.members
    inside = sum(member // per_node == rank // per_node for member in members)
    node, network = gpu.node_bandwidth * LINK_EFFICIENCY, gpu.network_bandwidth * LINK_EFFICIENCY
    if len(members) == 1:
        return 0.0
    if collective.operator.startswith("alltoall"):  # both networks work at the same time
        outside = (len(members) - inside) / (len(members) - 1)
        return max(collective.moved * (1 - outside) / node, collective.moved * outside / network)
    if inside == len(members):
        return collective.moved / node
    # A ring leaves the node through the adapters of all its ranks.
    return max(collective.moved / node, collective.moved / inside / network)


def totals(counts: Counts) -> Iterator[tuple[str, int, float, float]]:
    """Each kind of kernel with its launches, FLOPs and bytes."""
    sums = {kind: [0, 0, 0] for kind in (*_KINDS, "others")}
    for kernel, number in counts.kernels.items():
        kind = next((kind for kind, starts in _KINDS.items() if kernel.operator.startswith(starts)), "others")
        parts = number, number * kernel.flops, number * kernel.num_bytes
        sums[kind] = [before + part for before, part in zip(sums[kind], parts, strict=True)]
    yield from ((kind, launches, flops, size) for kind, (launches, flops, size) in sums.items() if launches)


def moved_by_group(counts: Counts) -> dict[tuple[str, int, str], tuple[int, float]]:
    """Group, its size and operator → number of collectives, and bytes that a rank sends in them."""
    moved: dict[tuple[str, int, str], tuple[int, float]] = {}
    for collective, number in counts.collectives.items():
        key = collective.group.name, len(collective.group.members), collective.operator
        before = moved.get(key, (0, 0.0))
        moved[key] = before[0] + number, before[1] + number * collective.moved
    return dict(sorted(moved.items()))


def disagreements(runs: list[DryRun]) -> Iterator[str]:
    """A message for each group in which two ranks that must launch the same collectives launch different ones.

    Ranks of one pipeline stage must agree in all groups; those of others in the groups that both belong to, but for
    what one stage sends to the next.
    """
    for first, second in combinations(runs, 2):
        ours, theirs = _shared(first, second), _shared(second, first)
        for group in sorted(ours.keys() | theirs.keys()):
            for place, pair in enumerate(zip_longest(ours.get(group, []), theirs.get(group, []))):
                if pair[0] != pair[1]:
                    one, other = (f"{item[0]} of {item[1]:,} bytes" if item else "nothing" for item in pair)
                    yield (
                        f"rank {first.rank} launches {one} as collective {place + 1} of group {group[0]}, where rank "
                        f"{second.rank} launches {other}: a run would hang"
                    )
                    break


def _shared(run: DryRun, other: DryRun) -> dict[tuple[str, Any], list[tuple[str, int]]]:
    """Operators and bytes of the collectives that a rank must launch as another one does, by group."""
    launched: dict[tuple[str, Any], list[tuple[str, int]]] = {}
    for collective in run.order:
        name, members = collective.group
        if run.stage == other.stage:  # each has its own groups of these names
            group: tuple[str, Any] = name, len(members)
        elif other.rank in members and collective.operator not in ("send", "recv_"):
            group = name, members
        else:
            continue
        launched.setdefault(group, []).append((collective.operator, collective.num_bytes))
    return launched
