"""Parallel layouts: the sizes of a run's process groups, and which layouts a model and a number of ranks allow.

The trainer's argument checks report every violated rule; the planner enumerates the layouts that violate none. This
module imports neither torch nor Megatron, so that the planner starts fast.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from moelpr.model.model_spec import ModelSpec, MoeSpec

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)

# torch.nn.functional.grouped_mm in bf16 on a GPU requires rows of a multiple of 16 bytes.
GROUPED_GEMM_ALIGNMENT = 8

_TP, _PP, _CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
_EP, _ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
SIZES = {"tp": _TP, "pp": _PP, "ep": _EP, "etp": _ETP}  # the planned ones


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, each at least 1. A run has tp · pp · cp · dp ranks."""

    tp: int = 1  # tensor parallel; with experts always together with sequence parallel
    pp: int = 1  # pipeline parallel
    ep: int = 1  # expert parallel: the new experts are divided over these ranks, the original ones are on all of them
    etp: int = 1  # tensor parallel inside experts
    dp: int = 1  # data parallel
    cp: int = 1  # context parallel
    vpp: int = 1  # virtual pipeline stages per rank

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], world_size: int, vpp: int) -> Self:
        """The layout that parsed arguments (or the recipe.yaml of a run) describe; sizes below 1 count as 1."""

        def size(name: str, default: int = 1) -> int:
            value = settings.get(f"{name}_parallel_size")
            return max(1, value if isinstance(value, int) else default)

        tp, pp, cp = size("tensor_model"), size("pipeline_model"), size("context")
        dp = max(1, world_size // (tp * pp * cp))
        return cls(tp, pp, size("expert_model"), size("expert_tensor", default=tp), dp, cp, max(1, vpp))

    @property
    def model_ranks(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def world_size(self) -> int:
        return self.model_ranks * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same new experts."""
        return self.world_size // (self.etp * self.ep * self.pp)


@dataclass(frozen=True)
class PlannedLayout(Layout):
    """A layout together with the settings that trade memory for compute or communication."""

    # The backward pass recomputes the MoE layers (router, dispatch and experts), or with "full" all layers.
    recompute: Recompute = "none"
    distributed_optimizer: bool = True  # optimizer state is divided over data-parallel ranks
    # Layers of the first and the last pipeline stage, if the layers are divided unevenly; the others have equally many.
    ends: tuple[int, int] | None = None

    @property
    def divides_optimizer(self) -> bool:
        """Whether the optimizer's state is really divided: there is more than one rank to divide it over."""
        return self.distributed_optimizer and max(self.dp, self.expert_dp) > 1

    def stage_sizes(self, layers: int) -> list[int]:
        """The layers of each pipeline stage, or virtual stage; stage s is on pipeline rank s modulo PP."""
        if self.ends is None:
            return [layers // (self.pp * self.vpp)] * (self.pp * self.vpp)
        first, last = self.ends
        return [first, *[(layers - first - last) // max(1, self.pp - 2)] * (self.pp - 2), last]

    def flags(self, has_experts: bool = True) -> list[str]:
        """The layout as arguments of a stage's launcher; sizes of 1 too, to override a recipe's."""
        sizes = {_TP: self.tp, _PP: self.pp} | ({_EP: self.ep, _ETP: self.etp} if has_experts else {})
        argv = [item for flag, size in sizes.items() for item in (flag, str(size))]
        if self.vpp > 1:
            argv += ["--num-virtual-stages-per-pipeline-rank", str(self.vpp)]
        for end, number in zip(("first", "last"), self.ends or (), strict=False):
            argv += [f"--decoder-{end}-pipeline-num-layers", str(number)]
        if self.tp > 1:
            argv.append("--sequence-parallel")
        if self.divides_optimizer:
            # Without overlap, Megatron gathers the weights twice: in each of its two optimizers' steps.
            argv += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
        if self.recompute == "selective":
            argv += ["--recompute-granularity", "selective", "--recompute-modules", "moe"]
        elif self.recompute == "full":
            argv += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
        return argv


def layout_problems(
    layout: Layout,
    world_size: int,
    spec: ModelSpec | None,
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    *,
    sequence_parallel: bool = False,
    even_pipeline: bool = True,
    torch_grouped_gemm: bool = True,
) -> Iterator[str]:
    """Yield a message for each rule that the layout violates; a layout without messages is legal.

    Args:
        spec: the model; None skips the rules about the model.
        seq_length: tokens per sequence; None skips its rules.
        micro_batch_size, global_batch_size: in sequences; None skips their rule.
        sequence_parallel: whether a dense model uses sequence parallelism; a model with experts always does.
        even_pipeline: whether all pipeline stages have equally many layers.
        torch_grouped_gemm: whether experts run as PyTorch's grouped GEMM on a GPU, which requires aligned rows.
    """
    has_experts = spec is not None and spec.moe is not None
    yield from _rank_problems(layout, world_size, has_experts)
    if spec is not None:
        if spec.moe is not None:
            yield from _expert_problems(layout, spec.moe, spec.megatron_args, torch_grouped_gemm)
        yield from _family_problems(layout, spec, has_experts or sequence_parallel)
        yield from _tensor_problems(layout.tp, spec.megatron_args)
        layers, positions = spec.megatron_args["num_layers"], spec.megatron_args["max_position_embeddings"]
        if even_pipeline and layers % layout.pp:
            yield (
                f"{_PP} {layout.pp} does not divide the model's {layers} layers; use {one_of(divisors(layers))}, or "
                "split the layers unevenly with --decoder-first-pipeline-num-layers"
            )
        if seq_length is not None and seq_length > positions:
            yield f"--seq-length must be at most {positions}, the model's number of positions, got {seq_length}"
    if seq_length is not None and seq_length >= 1:
        yield from _sequence_problems(layout, seq_length, has_experts or sequence_parallel)
    if micro_batch_size is not None and global_batch_size is not None and min(micro_batch_size, global_batch_size) >= 1:
        step = micro_batch_size * layout.dp
        if world_size % layout.model_ranks == 0 and global_batch_size % step:
            yield (
                f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} x "
                f"{layout.dp} data-parallel ranks = {step}; use {neighbors(global_batch_size, step)}"
            )


def _rank_problems(layout: Layout, world_size: int, has_experts: bool) -> Iterator[str]:
    products = [{_TP: layout.tp, _PP: layout.pp, _CP: layout.cp}]
    if has_experts and layout.etp * layout.ep != layout.tp * layout.cp:  # else it is the same product
        products.append({_ETP: layout.etp, _EP: layout.ep, _PP: layout.pp})
    for sizes in products:
        product = math.prod(sizes.values())
        if world_size % product:
            factors = " x ".join(f"{flag} {size}" for flag, size in sizes.items())
            if _ETP in sizes and layout.etp == layout.tp > 1:
                factors = factors.replace(" x", f" (by default {_TP}) x", 1)
            yield (
                f"{factors} = {product} does not divide the number of processes, {world_size}; start a multiple of "
                f"{product} processes, or choose sizes whose product is {one_of(divisors(world_size))}"
            )


def _expert_problems(layout: Layout, moe: MoeSpec, shape: Mapping[str, Any], torch_grouped_gemm: bool) -> Iterator[str]:
    if (experts := moe.num_new_experts) % layout.ep:
        yield f"{_EP} {layout.ep} does not divide the model's {experts} new experts; use {one_of(divisors(experts))}"
    if layout.etp not in (1, layout.tp):
        yield (
            f"{_ETP} must be 1 or {_TP} {layout.tp}, got {layout.etp}; original experts are split over all "
            f"tensor-parallel ranks or not at all, use {one_of(sorted({1, layout.tp}))}"
        )
    if not torch_grouped_gemm:
        return
    hidden, ffn = shape["hidden_size"], shape["ffn_hidden_size"]
    per_rank = ffn // layout.etp if ffn % layout.etp == 0 else 0  # else `_tensor_problems` reports it
    counts = {"the model's hidden size": hidden, "FFN rows per expert-tensor-parallel rank": per_rank}
    for name, count in counts.items():
        if count % GROUPED_GEMM_ALIGNMENT:
            is_split = count != hidden and layout.etp > 1 and ffn % GROUPED_GEMM_ALIGNMENT == 0
            fix = f"use {_ETP} 1" if is_split else "use another model"
            yield f"{name} must be a multiple of {GROUPED_GEMM_ALIGNMENT} for grouped GEMM on a GPU, got {count}; {fix}"


def _tensor_problems(tp: int, shape: Mapping[str, Any]) -> Iterator[str]:
    heads, groups = shape["num_attention_heads"], shape["num_query_groups"]
    qkv_rows = shape["kv_channels"] * (heads + 2 * groups)
    counts = {"attention heads": heads, "FFN rows": shape["ffn_hidden_size"], "query, key and value rows": qkv_rows}
    if "linear_attention_freq" in shape:
        counts["key heads of linear attention"] = shape["linear_num_key_heads"]

    def indivisible(size: int) -> list[str]:
        wrong = [f"{count} {name}" for name, count in counts.items() if count % size]
        # Several ranks may share a query group.
        return wrong + ([f"{groups} query groups"] if groups % size and size % groups else [])

    if wrong := indivisible(tp):
        works = [size for size in divisors(heads) if not indivisible(size)]
        yield f"{_TP} {tp} does not divide the model's {', '.join(wrong)}; use {one_of(works)}"


def _family_problems(layout: Layout, spec: ModelSpec, sequence_parallel: bool) -> Iterator[str]:
    if layout.tp > 1 and spec.megatron_args.get("norms_after"):
        yield f"{_TP} {layout.tp} would split the heads, over all of which OLMo 2 normalizes queries and keys; use 1"
    if "linear_attention_freq" not in spec.megatron_args:
        return
    if layout.cp > 1:
        yield f"{_CP} {layout.cp} is not tested with linear attention; use 1, and {_TP} for long sequences"
    if layout.tp > 1 and not sequence_parallel:
        # Megatron sums the gradient of its output norm over the ranks only then.
        yield f"{_TP} {layout.tp} requires --sequence-parallel in a model with linear attention; add it"


def _sequence_problems(layout: Layout, length: int, sequence_parallel: bool) -> Iterator[str]:
    over_context = 2 * layout.cp if layout.cp > 1 else 1
    over_tensor = layout.tp * layout.cp if sequence_parallel and layout.tp > 1 else 1
    multiple = math.lcm(over_context, over_tensor)
    if length % multiple:
        why = [f"2 x {_CP} {layout.cp}"] if length % over_context else []
        why += [f"{_TP} {layout.tp} with sequence parallelism"] if length % over_tensor else []
        yield (
            f"--seq-length {length} is not divisible by {' or '.join(why)}; use a multiple of {multiple}, such as "
            f"{neighbors(length, multiple)}"
        )


def divisors(number: int) -> list[int]:
    """The divisors of `number`, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def one_of(values: list[int]) -> str:
    """The values for a message: "1", or "one of 1, 2, 4"."""
    return f"one of {', '.join(map(str, values))}" if len(values) > 1 else str(*values)


def neighbors(number: int, multiple: int) -> str:
    """The positive multiples of `multiple` around `number`, for a message: "28 or 32"."""
    below, above = number // multiple * multiple, math.ceil(number / multiple) * multiple
    return f"{below} or {above}" if below else str(above)
