"""The layouts that fit a cluster and their costs, in order of preference; if none fits, the error says what would."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from moelpr.base.errors import UserError
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES
from moelpr.plan.gpus import GIB, RESERVED_FRACTION, Cluster
from moelpr.plan.layouts import RECOMPUTES, SIZES, Layout, PlannedLayout, divisors, layout_problems, one_of
from moelpr.plan.memory import Parts, RankMemory, Workload, model_parts, stage_memories
from moelpr.plan.step_time import StepTime, Traffic, expert_traffic, step_time

# Several nodes: ranks agree once on what a checkpoint is, read each weight once, and collect garbage in the same steps.
# Before the first step, products and links of all GPUs are measured, and outliers named.
_SEVERAL_NODES = "--ckpt-assume-constant-structure --ckpt-fully-parallel-load --manual-gc --manual-gc-interval=100 "
_SEVERAL_NODES += "--gpu-sniff-test-interval=1000000000"
MOST_EXPERTS = 8  # the largest N that is chosen automatically
_SLOWER = 1.1  # times the fastest micro-batch: larger ones are then not tried
MOST_VIRTUAL_STAGES = 4  # per rank

Settings = Mapping[str, float | None]  # flags of the planner; the value of one without is None


@dataclass(frozen=True)
class Candidate:
    """A layout with its costs."""

    layout: PlannedLayout
    stages: list[RankMemory]  # one rank of each pipeline stage
    traffic: Traffic
    step_time: StepTime

    @property
    def peak(self) -> RankMemory:
        """The rank that needs the most memory."""
        return max(self.stages, key=lambda rank: rank.total_bytes)

    def speed_flags(self, workload: Workload) -> list[str]:
        """Arguments of the stage's launcher that decide how fast it is, not what it learns."""
        argv = self.layout.flags(has_experts=workload.stage not in DENSE_STAGES)
        ways = {"--optimizer-cpu-offload": workload.optimizer_cpu_offload, "--bf16-moments": workload.bf16_moments}
        if chosen := [flag for flag, is_set in ways.items() if is_set]:
            argv += [*chosen, *(["--use-distributed-optimizer"] * (not self.layout.divides_optimizer))]
        if self.layout.world_size > 8:
            argv += [*_SEVERAL_NODES.split(), *(["--async-save"] * (not workload.optimizer_cpu_offload))]
        return [*argv, "--micro-batch-size", str(workload.micro_batch_size)]

    def flags(self, workload: Workload) -> list[str]:
        """Arguments of the stage's launcher: the layout, and the batch it was planned for."""
        argv = [*self.speed_flags(workload), "--global-batch-size", str(workload.global_batch_size)]
        argv += ["--seq-length", str(workload.seq_length)]
        argv += ["--train-new-embeddings"] if workload.new_embeddings else []
        argv += ["--train-everything"] if workload.train_everything else []
        argv += ["--stage1-experts", "new"] if workload.stage1_experts == "new" else []
        return argv


@dataclass(frozen=True)
class Remedy:
    """Settings with which a model fits; `gib` is what a rank then needs, if known."""

    settings: Settings
    gib: float | None = None

    def __str__(self) -> str:
        flags = " with ".join(flag if value is None else f"{flag} {value:g}" for flag, value in self.settings.items())
        if "--gpu-memory-gib" in self.settings:
            return f"{flags} or more"
        return flags + (f" (fits in {self.gib:.1f} GiB)" if self.gib else "")


class DoesNotFitError(UserError):
    """No layout fits: its smallest need and what is usable, in GiB per rank, and what would fit."""

    def __init__(self, gpus: int, needed_gib: float, usable_gib: float, remedies: list[Remedy]) -> None:
        self.needed_gib, self.usable_gib, self.remedies = needed_gib, usable_gib, remedies
        *first, last = map(str, remedies)
        super().__init__(
            f"no layout fits on {gpus} GPU{'s' if gpus > 1 else ''}: the smallest needs {needed_gib:.1f} GiB per rank "
            f"and {usable_gib:.1f} GiB are usable; use {', '.join(first)}{', or ' if first else ''}{last}"
        )


def fitting(spec: ModelSpec, workload: Workload, cluster: Cluster) -> list[Candidate]:
    """The layouts whose highest-memory rank fits, best first.

    Raises:
        DoesNotFitError: no layout fits; the message names settings that do.
        UserError: no layout has that many GPUs.
    """
    if problem := next(layout_problems(Layout(), 1, spec, *workload.lengths), None):
        raise UserError(problem)  # true of every layout
    if not any(legal_layouts(spec, workload, cluster)):
        raise UserError(_no_layout(spec, workload, cluster))
    return _fits(spec, workload, cluster) or _raise_does_not_fit(spec, workload, cluster)


def _fits(spec: ModelSpec, workload: Workload, cluster: Cluster) -> list[Candidate]:
    """The layouts that fit, in order of preference."""
    parts = model_parts(spec)
    fits = []
    for layout, memories in _with_room(spec, parts, workload, cluster):
        time = step_time(spec, parts, layout, workload, cluster, memories)
        fits.append(Candidate(layout, memories, expert_traffic(spec, layout, workload), time))
    fastest_s = min((one.step_time.total_s for one in fits), default=1)

    def key(one: Candidate) -> tuple[float, ...]:
        return preference(one.layout, one.step_time.total_s / fastest_s, cluster, sum(one.traffic))

    return sorted(fits, key=key)


def _with_room(
    spec: ModelSpec, parts: Parts, workload: Workload, cluster: Cluster
) -> Iterator[tuple[PlannedLayout, list[RankMemory]]]:
    """The layouts whose ranks all fit, with their memory."""
    for layout in legal_layouts(spec, workload, cluster):
        if memories := stage_memories(spec, parts, layout, workload, most_bytes=cluster.usable_bytes):
            yield layout, memories


def fitting_any_micro_batch(spec: ModelSpec, workload: Workload, cluster: Cluster) -> tuple[list[Candidate], Workload]:
    """The layouts, best first, and the workload with the micro-batch whose best layout is predicted to be the fastest.

    Raises:
        DoesNotFitError: not even micro-batches of one sequence fit.
    """
    size, most = workload.micro_batch_size, workload.global_batch_size
    sizes = {size >> power for power in range(size.bit_length())}
    sizes |= {size << power for power in range(most.bit_length()) if size << power <= most}
    tried: list[tuple[float, list[Candidate], Workload]] = []
    for work in (replace(workload, micro_batch_size=each) for each in sorted(sizes)):
        if fits := _fits(spec, work, cluster):
            tried.append((fits[0].step_time.total_s, fits, work))
        if tried and (not fits or tried[-1][0] > _SLOWER * min(one[0] for one in tried)):
            break  # a larger one needs more memory
    if not tried:
        smallest = replace(workload, micro_batch_size=1)
        return fitting(spec, smallest, cluster), smallest
    _, fits, work = min(tried, key=lambda one: one[0])
    return fits, work


def numbers_of_experts(spec: ModelSpec, cluster: Cluster) -> list[int]:
    """The N to choose from, largest first: up to 8, where N divides the GPUs of a node or they divide N."""
    assert spec.moe is not None
    node, least = min(cluster.gpus, cluster.gpus_per_node), spec.moe.topk - spec.moe.num_original_places
    numbers = range(MOST_EXPERTS, max(least, 1) - 1, -1)
    return [n for n in numbers if n % node == 0 or node % n == 0] or [MOST_EXPERTS]


def with_num_experts(spec: ModelSpec, number: int) -> ModelSpec:
    assert spec.moe is not None
    return replace(spec, moe=replace(spec.moe, num_new_experts=number))


def most_experts(spec: ModelSpec, workload: Workload, cluster: Cluster) -> ModelSpec:
    """The model with the largest of `numbers_of_experts` that fits, if possible without recomputing all layers.

    Raises:
        DoesNotFitError: none fits; its remedies are those of the smallest number.
    """
    models = [with_num_experts(spec, number) for number in numbers_of_experts(spec, cluster)]
    best = [_fits(model, workload, cluster)[:1] for model in models]
    fits = [(model, one.layout.recompute) for model, candidates in zip(models, best, strict=True) for one in candidates]
    if not fits:
        fitting(models[-1], workload, cluster)
    return next((model for model, recompute in fits if recompute != "full"), fits[0][0])


def legal_layouts(spec: ModelSpec, workload: Workload, cluster: Cluster) -> Iterator[PlannedLayout]:
    """Yield every layout of all GPUs that the trainer accepts and whose tensor-parallel groups stay inside a node.

    The first and the last pipeline stage have fewer layers than the others where PP does not divide the layers, and
    virtual stages where it does. Context parallelism is not planned.
    """
    new_experts, recomputes = (spec.moe.num_new_experts, RECOMPUTES) if spec.moe else (1, ("none", "full"))
    for tp in (tp for tp in divisors(cluster.gpus) if not cluster.leaves_node(tp)):
        for pp in divisors(cluster.gpus // tp):
            for ep, etp in itertools.product(divisors(new_experts), sorted({1, tp}) if spec.moe else [tp]):
                plain = PlannedLayout(tp, pp, ep, etp, dp=cluster.gpus // (tp * pp))
                for layout in _divided(plain, spec.megatron_args["num_layers"], workload):
                    options = {"sequence_parallel": True, "even_pipeline": layout.ends is None}
                    has_sizes = all(getattr(layout, name) == size for name, size in workload.sizes)
                    if has_sizes and not any(layout_problems(layout, cluster.gpus, spec, *workload.lengths, **options)):
                        yield from (replace(layout, recompute=each) for each in recomputes)


def _divided(layout: PlannedLayout, layers: int, workload: Workload) -> Iterator[PlannedLayout]:
    """The ways to divide layers over pipeline stages."""
    if layers % layout.pp == 0:
        yield layout
        if layout.pp > 1 and workload.num_microbatches(layout) % layout.pp == 0:
            sizes = divisors(layers // layout.pp)
            yield from (replace(layout, vpp=size) for size in sizes if 1 < size <= MOST_VIRTUAL_STAGES)
        return
    ends = layers - (layout.pp - 2) * math.ceil(layers / layout.pp)
    if ends >= 2:
        yield replace(layout, ends=(ends - ends // 2, ends // 2))


def preference(layout: PlannedLayout, time: float, cluster: Cluster, traffic_bytes: float) -> tuple[float, ...]:
    """Sort key among layouts that fit; the smallest is recommended. A rule of thumb, not a measurement.

    In this order: the smallest `time`, in steps of 1/20 (smaller differences are below the error of predictions);
    experts exchanged inside a node; the model divided over as few ranks as possible; pipeline before tensor
    parallelism, because a pipeline stage sends one tensor where tensor parallelism exchanges one per layer; the fewest
    bytes of expert traffic; the least time.
    """
    expert_ranks = layout.ep * layout.etp
    leaves = cluster.leaves_node(expert_ranks)
    return round(20 * time), leaves, layout.tp * layout.pp, layout.tp, traffic_bytes, expert_ranks, time


def _no_layout(spec: ModelSpec, workload: Workload, cluster: Cluster) -> str:
    workload, sizes = replace(workload, sizes=()), workload.sizes
    legal = [*legal_layouts(spec, workload, cluster)]
    for name, size in sizes:
        before, legal = legal, [one for one in legal if getattr(one, name) == size]
        if before and not legal:
            works = one_of(sorted({getattr(one, name) for one in before}))
            return f"no layout of {cluster.gpus} GPUs has {SIZES[name]} {size}; use {works}, or remove it"
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


def _raise_does_not_fit(spec: ModelSpec, workload: Workload, cluster: Cluster) -> NoReturn:
    parts = model_parts(spec)
    ranks = (stage_memories(spec, parts, layout, workload) for layout in legal_layouts(spec, workload, cluster))
    least = min(max(rank.total_bytes for rank in stages) for stages in ranks) / GIB
    enough_gib = math.ceil(max(least + cluster.reserve_gib, least / (1 - RESERVED_FRACTION)) * 10) / 10
    remedies = [*_changes_that_fit(spec, workload, cluster), Remedy({"--gpu-memory-gib": enough_gib})]
    larger = (one.gpus for one in _other_sizes(cluster)[1] if any(_with_room(spec, parts, workload, one)))
    remedies += [Remedy({"--gpus": gpus}) for gpus in itertools.islice(larger, 1)]
    raise DoesNotFitError(cluster.gpus, least, cluster.usable_bytes / GIB, remedies)


def _changes_that_fit(spec: ModelSpec, workload: Workload, cluster: Cluster) -> list[Remedy]:
    """The smallest change of each kind after which the model fits: of the micro-batch, the optimizer or the experts.

    If none is enough, those that are with the optimizer on the host, and then also with a micro-batch of 1.
    """
    *smaller, _ = divisors(workload.micro_batch_size)
    sizes: list[Settings] = [{"--micro-batch-size": size} for size in reversed(smaller)]
    numbers = numbers_of_experts(spec, cluster) if spec.moe else []
    fewer: list[Settings] = [{"--num-new-experts": n} for n in numbers if spec.moe and n < spec.moe.num_new_experts]
    on_host: Settings = {"--optimizer-cpu-offload": None}
    has_one = workload.optimizer_cpu_offload or workload.bf16_moments
    optimizers: list[Settings] = [] if has_one else [{"--bf16-moments": None}, on_host]
    for changes in (
        [*sizes, *optimizers, *fewer],
        [{**on_host, **change} for change in (*sizes, *fewer)],
        [{**on_host, "--micro-batch-size": 1, **change} for change in fewer],
    ):
        enough: dict[frozenset[str], Remedy] = {}
        for settings in changes:
            kind = frozenset(settings)
            if kind not in enough and (fits := _fits(*_changed(spec, workload, settings), cluster)):
                enough[kind] = Remedy(settings, fits[0].peak.total_bytes / GIB)
        if enough:
            return [*enough.values()]
    return []


def _changed(spec: ModelSpec, workload: Workload, settings: Settings) -> tuple[ModelSpec, Workload]:
    fields: dict[str, Any] = {flag[2:].replace("-", "_"): value or True for flag, value in settings.items()}
    if number := fields.pop("num_new_experts", None):
        spec = with_num_experts(spec, number)
    if "optimizer_cpu_offload" in fields:
        fields["bf16_moments"] = False
    return spec, replace(workload, **fields)


def _other_sizes(cluster: Cluster) -> tuple[list[Cluster], list[Cluster]]:
    """Smaller and larger clusters, nearest first: part of a node, and up to 64 full nodes."""
    node = cluster.gpus_per_node
    sizes = [replace(cluster, gpus=gpus) for gpus in [*range(1, node), *range(node, 64 * node + 1, node)]]
    smaller = [size for size in reversed(sizes) if size.gpus < cluster.gpus]
    return smaller, [size for size in sizes if size.gpus > cluster.gpus]
