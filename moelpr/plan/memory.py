"""Memory of a rank, in bytes, computed from shapes; docs/design/planner.md gives the equations.

A frozen parameter costs its weight. A trainable parameter also costs its gradient and its optimizer state, which the
distributed optimizer divides over the ranks that hold the same parameter: for a router the data-parallel ranks, for a
new expert the expert-data-parallel ranks. `tests/dry_run` compares the results with dry runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from moelpr.model.families.families import family_named
from moelpr.model.families.tables import pieces
from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.model.stages import CHUNK_LOGITS, VOCABULARY_PARTS, Part, Stage, Stage1Experts, part_of, trained_parts
from moelpr.plan.layouts import PlannedLayout

# Bytes per parameter.
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
GRADIENT_BYTES = 4  # in fp32: Megatron's default for bf16 too, without --grad-reduce-in-bf16
MOMENT_BYTES = 8  # Adam's two, in fp32
MASTER_BYTES = {"bf16": 4, "fp32": 0}  # a copy of the weight in fp32
REDUCED_STATE_BYTES = 6  # with --bf16-moments: these, and the 16 bits that a weight in bf16 lacks
# With the optimizer on the host: a copy of the weight, Adam's two moments, and the gradient, whose pinned memory torch
# rounds up to a power of two.
HOST_BYTES = 4 + MOMENT_BYTES + 2 * GRADIENT_BYTES

# Memory of torch, Megatron and Python in a rank without a GPU, in addition to the code that all ranks share.
PROCESS_BYTES = 450 << 20

# Megatron pads the vocabulary to a multiple of this times the tensor-parallel size (--make-vocab-size-divisible-by).
VOCABULARY_MULTIPLE = 128

# Tokens that linear attention computes at once.
LINEAR_CHUNK = 64

_FP32, _INT64, _BOOL = 4, 8, 1
_EXPERT_PARTS = Part.ORIGINAL_EXPERTS, Part.NEW_EXPERTS

Dtype = Literal["bf16", "fp32"]
# Layer (0-based; None for embedding, final norm and output layer) and part → number of parameters in the full model.
Parts = Mapping[tuple[int | None, Part], int]


@dataclass(frozen=True)
class Kernels:
    """Properties of kernels that decide what is kept for the backward pass: by default a GPU's; `CPU` for tests."""

    fp32_norm_input: bool = False  # a norm keeps an fp32 copy of its input, and if it trains, of what its weight scales
    # The norm before attention or a dense FFN keeps its output too, as Transformer Engine's fused norm and linear layer
    # has done even if the linear is frozen; counted, to be on the safe side.
    norm_output: bool = True
    fused_swiglu: bool = True  # dense FFNs keep only gate and up, as experts always do, and no intermediate value
    fused_loss: bool = True  # unless all rows of the output layer train


CPU = Kernels(fp32_norm_input=True, norm_output=False, fused_swiglu=False, fused_loss=False)


@dataclass(frozen=True)
class Routing:
    """Rows per token of a rank that go to the original experts and to the new experts."""

    original_rows: float
    new_rows: float

    @classmethod
    def uniform(cls, moe: MoeSpec, stage1_experts: Stage1Experts = "all") -> "Routing":
        """All experts that tokens can choose are chosen equally often, on every rank."""
        if stage1_experts == "new":
            return cls(original_rows=0, new_rows=moe.topk)
        rows, experts = moe.topk, moe.num_experts
        # A token that chose several copies of the dense FFN is one row of it.
        dense = 1 - math.comb(experts - moe.original_copies, rows) / math.comb(experts, rows)
        return cls(dense + rows * (moe.num_original_experts - 1) / experts, rows * moe.num_new_experts / experts)


@dataclass(frozen=True)
class Workload:
    """A stage, its dtype and its sizes: `seq_length` in tokens, batch sizes in sequences."""

    stage: Stage
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    dtype: Dtype = "bf16"
    kernels: Kernels = Kernels()
    new_embeddings: bool = False  # stage 1 also trains rows of new tokens
    train_everything: bool = False  # as stage "dense" does
    stage1_experts: Stage1Experts = "all"
    optimizer_cpu_offload: bool = False
    gradient_bytes: int = GRADIENT_BYTES  # per parameter
    bf16_moments: bool = False
    sizes: tuple[tuple[str, int], ...] = ()  # sizes of the layout (tp, pp, ep, etp) that the user chose

    @property
    def trained(self) -> frozenset[Part]:
        """The parts with gradients and optimizer state, in embedding and output layer for all rows."""
        return trained_parts(self.stage, self.train_everything, self.new_embeddings)

    @property
    def lengths(self) -> tuple[int, int, int]:
        return self.seq_length, self.micro_batch_size, self.global_batch_size

    def num_microbatches(self, layout: PlannedLayout) -> int:
        """Micro-batches per step and data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * layout.dp)


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank. `frozen` and `trainable` are numbers of parameters; the others are bytes.

    `host_bytes` are not on the GPU, so not in the sum.
    """

    frozen: int
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    working_bytes: int
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        state = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return state + self.activation_bytes + self.working_bytes


def model_parts(spec: ModelSpec) -> Parts:
    """The sizes of the model's parts, counted in the name table of its family, without padding of the vocabulary."""
    sums: dict[tuple[int | None, Part], int] = {}
    for piece in pieces(family_named(spec.family).table, spec):
        names = piece.key.split(".")
        layer = int(names[2]) if names[:2] == ["decoder", "layers"] else None
        place = (layer, part_of(piece.key))
        sums[place] = sums.get(place, 0) + sum(map(math.prod, piece.hf_shapes))
    return sums


def checkpoint_bytes(
    parts: Parts, trained: frozenset[Part], dtype: Dtype, distributed: bool, trained_only: bool, optimizer: bool = True
) -> int:
    """The bytes of the tensors in one checkpoint: the weights, and the optimizer state of what is trained.

    Args:
        distributed: whether the run uses the distributed optimizer.
        trained_only: whether only trained weights are saved.
        optimizer: whether the optimizer's state is saved.
    """
    # The distributed optimizer saves a copy of fp32 weights too.
    state = (MASTER_BYTES["bf16" if distributed else dtype] + MOMENT_BYTES) * optimizer
    return sum(
        numel * (WEIGHT_BYTES[dtype] * (part in trained or not trained_only) + state * (part in trained))
        for (_, part), numel in parts.items()
    )


def export_parameters(spec: ModelSpec, parts: Parts) -> int:
    """Parameters of the Hugging Face export, which has each copy of the dense FFN."""
    places, experts = (spec.moe.num_original_places, spec.moe.num_original_experts) if spec.moe else (1, 1)
    return sum(
        numel // experts * places if part is Part.ORIGINAL_EXPERTS else numel for (_, part), numel in parts.items()
    )


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of the embedding as the trainer pads them for `tp` tensor-parallel ranks."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def stage_memories(
    spec: ModelSpec,
    parts: Parts,
    layout: PlannedLayout,
    workload: Workload,
    routing: Routing | None = None,
    most_bytes: float = math.inf,
) -> list[RankMemory]:
    """The memory of one rank per pipeline stage, as all ranks of a stage need the same; empty if it is too much.

    `parts` are the model's `model_parts`; `routing` is `Routing.uniform` by default.
    """
    activations = Activations(spec, layout, workload, routing)
    memories: list[RankMemory] = []
    for pp_rank in range(layout.pp):
        held = held_on_stage(spec, parts, layout, pp_rank)
        trained = {part: numel for part, numel in held.items() if part in workload.trained}
        trainable = sum(trained.values())
        state = 0  # parameters whose state this rank has
        for part, numel in trained.items():
            replicas = layout.expert_dp if part is Part.NEW_EXPERTS else layout.dp
            state += math.ceil(numel / replicas) if layout.distributed_optimizer else numel
        is_on_host = workload.optimizer_cpu_offload
        state_bytes = REDUCED_STATE_BYTES if workload.bf16_moments else MASTER_BYTES[workload.dtype] + MOMENT_BYTES
        memories.append(
            RankMemory(
                frozen=sum(held.values()) - trainable,
                trainable=trainable,
                parameter_bytes=sum(held.values()) * WEIGHT_BYTES[workload.dtype],
                gradient_bytes=trainable * workload.gradient_bytes,
                optimizer_bytes=0 if is_on_host else state * state_bytes,
                activation_bytes=round(activations.peak(pp_rank)),
                working_bytes=round(activations.working(pp_rank)),
                host_bytes=HOST_BYTES * state if is_on_host else 0,
            )
        )
        if memories[-1].total_bytes > most_bytes:
            return []
    return memories


def held_on_stage(spec: ModelSpec, parts: Parts, layout: PlannedLayout, pp_rank: int) -> dict[Part, int]:
    """Parameters on one rank of a pipeline stage, by part, with the vocabulary padded as in the trainer."""
    is_tied = not spec.megatron_args["untie_embeddings_and_output_weights"]
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    layers = {*layers_of_stage(spec, layout, pp_rank)}
    vocab_size = spec.megatron_args["vocab_size"]
    held: dict[Part, int] = {}
    for (layer, part), numel in parts.items():
        is_on_this_end = is_first or (is_last and is_tied) if part is Part.EMBEDDING else is_last
        if not (is_on_this_end if layer is None else layer in layers):
            continue
        if part in VOCABULARY_PARTS:
            numel = numel // vocab_size * padded_vocabulary(vocab_size, layout.tp)
        held[part] = held.get(part, 0) + numel
    for part, numel in held.items():
        assert numel % divisor(part, layout) == 0, (part, numel, layout)
        held[part] = numel // divisor(part, layout)
    return held


def divisor(part: Part, layout: PlannedLayout) -> int:
    """Number of ranks of a pipeline stage over which the tensors of a part are divided."""
    # Every expert-parallel rank has a copy of the original experts.
    experts = {Part.ORIGINAL_EXPERTS: layout.etp, Part.NEW_EXPERTS: layout.ep * layout.etp}
    return (experts | {Part.ROUTER: 1, Part.NORM: 1}).get(part, layout.tp)


def layers_of_stage(spec: ModelSpec, layout: PlannedLayout, pp_rank: int) -> tuple[int, ...]:
    """The layers of a pipeline rank, of all its virtual stages, counted from 0."""
    return _layers_of_stage(spec.megatron_args["num_layers"], layout.pp, layout.vpp, layout.ends, pp_rank)


@cache
def _layers_of_stage(layers: int, pp: int, vpp: int, ends: tuple[int, int] | None, pp_rank: int) -> tuple[int, ...]:
    sizes = PlannedLayout(pp=pp, vpp=vpp, ends=ends).stage_sizes(layers)
    after = [*accumulate(sizes)]
    return tuple(layer for stage in range(pp_rank, len(sizes), pp) for layer in range(after[stage])[-sizes[stage] :])


def needs_input_gradient(
    spec: ModelSpec, layout: PlannedLayout, layer: int, pp_rank: int, trained: frozenset[Part]
) -> bool:
    """Whether the backward pass continues below the FFN of `layer`.

    It ends at the first FFN that trains unless the embedding does, except that an input from another pipeline stage,
    and with recompute the embedding's output, always require a gradient.
    """
    first = spec.moe.layers[0] if spec.moe else 0
    return Part.EMBEDDING in trained or pp_rank > 0 or layout.recompute != "none" or layer > first


def trains_output(spec: ModelSpec, trained: frozenset[Part]) -> bool:
    """Whether the weights of the output layer, which may be the embedding's, train."""
    is_untied = spec.megatron_args["untie_embeddings_and_output_weights"]
    return (Part.OUTPUT_LAYER if is_untied else Part.EMBEDDING) in trained


class Activations:
    """Bytes that autograd keeps on a rank (docs/design/planner.md); attributes are sizes on one rank."""

    def __init__(self, spec: ModelSpec, layout: PlannedLayout, workload: Workload, routing: Routing | None) -> None:
        shape = spec.megatron_args
        self.spec, self.layout, self.workload = spec, layout, workload
        self.trained = workload.trained
        self.routing = routing or (Routing.uniform(spec.moe, workload.stage1_experts) if spec.moe else Routing(0, 0))
        self.element = WEIGHT_BYTES[workload.dtype]
        self.norm_element = _FP32 if workload.kernels.fp32_norm_input else self.element
        trains_norms = workload.kernels.fp32_norm_input and Part.NORM in self.trained
        self.norm_bytes = self.norm_element * (2 if trains_norms else 1)  # per element of a norm's input
        self.all_tokens = workload.seq_length * workload.micro_batch_size
        self.tokens = self.all_tokens / layout.tp
        self.hidden, self.head = shape["hidden_size"], shape["kv_channels"]
        self.heads = shape["num_attention_heads"] / layout.tp
        self.groups = max(shape["num_query_groups"] / layout.tp, 1)
        self.has_qk_norm = shape["qk_layernorm"]
        self.ffn = shape["ffn_hidden_size"] / layout.tp
        self.expert_ffn = shape["ffn_hidden_size"] / layout.etp
        self.sums_originals = spec.moe is not None and spec.moe.num_original_experts > 1 and workload.kernels.fused_loss
        self.fuses_loss = workload.kernels.fused_loss and self.trained != frozenset(Part)
        self.vocabulary = padded_vocabulary(shape["vocab_size"], layout.tp) / layout.tp
        # Each rank of an expert-tensor-parallel group processes the rows of all ranks of the group.
        self.original_rows = self.tokens * layout.etp * self.routing.original_rows
        self.new_rows = self.tokens * layout.etp * self.routing.new_rows

    def layers(self, pp_rank: int) -> list[tuple[float, float]]:
        """The bytes kept from each layer's forward pass, and those allocated only while the layer is recomputed."""
        layers = layers_of_stage(self.spec, self.layout, pp_rank)
        needs = (needs_input_gradient(self.spec, self.layout, one, pp_rank, self.trained) for one in layers)
        return [self._layer(one, needed) for one, needed in zip(layers, needs, strict=True)]

    def peak(self, pp_rank: int) -> float:
        kept, inside = zip(*self.layers(pp_rank), strict=True)
        pp, vpp, number = self.layout.pp, self.layout.vpp, self.workload.num_microbatches(self.layout)
        in_flight: float = min(pp - pp_rank, number)
        if vpp > 1:  # counted in micro-batches of all its virtual stages
            in_flight = min(2 * (pp - pp_rank - 1) + (vpp - 1) * pp + 1, vpp * number) / vpp
        return in_flight * sum(kept) + max(self.loss(pp_rank), *inside)

    def working(self, pp_rank: int) -> float:
        new = self.new_rows * (3 * self.expert_ffn + self.hidden)
        original = self.original_rows * (2 * self.expert_ffn + self.hidden)
        dense = self.all_tokens * 3 * self.ffn if self.spec.moe is None else 0
        is_last = pp_rank == self.layout.pp - 1
        logits = self.all_tokens * self.vocabulary if is_last and self.workload.dtype != "fp32" else 0
        if self.fuses_loss:
            logits /= math.ceil(logits / CHUNK_LOGITS) or 1
        trains_last = is_last and trains_output(self.spec, self.trained)
        has_gradient = (pp_rank == 0 and Part.EMBEDDING in self.trained) or trains_last
        return max(new + original, dense, logits, self.vocabulary * self.hidden * has_gradient) * self.element

    def _layer(self, layer: int, needs_gradient: bool) -> tuple[float, float]:
        hidden = self.tokens * self.hidden * self.element
        attention = self._linear_attention if self.spec.is_linear_layer(layer) else self._attention
        outside = self._norm() + attention() + self._norm() if needs_gradient else 0.0
        # A norm may keep its output, which a linear layer that trains keeps as its input.
        keeps_output = self.workload.kernels.norm_output
        if needs_gradient and (keeps_output or Part.ATTENTION in self.trained):
            outside += hidden
        if self.spec.moe is not None and self.spec.is_moe_layer(layer):
            outside += hidden  # the router's input, which Megatron keeps even if the router is frozen
            inside = self._experts(self.spec.moe)
        else:
            trains = Part.DENSE_FFN in self.trained
            outside += hidden if trains or (needs_gradient and keeps_output) else 0
            # Gate, up and silu(gate), and what the down projection reads.
            values = (2 if self.workload.kernels.fused_swiglu else 3) + trains
            inside = self.all_tokens * values * self.ffn * self.element if needs_gradient or trains else 0.0
        if self.layout.recompute == "full":
            # A norm that keeps its input without an fp32 copy shares it with the checkpointed layer input.
            return hidden, outside + inside - (hidden if self.norm_element == self.element else 0.0)
        if self.layout.recompute == "selective" and self.spec.is_moe_layer(layer):
            return outside, inside
        return outside + inside, 0.0

    def _norm(self) -> float:
        return self.tokens * (self.hidden * self.norm_bytes + _FP32)

    def _attention(self) -> float:
        query, key = self.heads * self.head, self.groups * self.head
        projected, rotated, output = query + 2 * key, query + key, query
        if self.spec.megatron_args.get("attention_output_gate"):
            projected, output = projected + query, 3 * query  # the gate, its sigmoid, and the output before it
        elements = self.all_tokens * (projected + rotated + output)
        log_sums = self.all_tokens * self.heads * _FP32
        qk_norm = self.all_tokens * (query + key) * self.norm_bytes if self.has_qk_norm else 0
        return elements * self.element + log_sums + qk_norm

    def _linear_attention(self) -> float:
        """Bytes that fla's kernels and Megatron's operations around them keep; an estimate, which was not measured."""
        shape, tp = self.spec.megatron_args, self.layout.tp
        heads, key_width = shape["linear_num_value_heads"] / tp, shape["linear_key_head_dim"]
        keys, values = shape["linear_num_key_heads"] * key_width / tp, heads * shape["linear_value_head_dim"]
        projected, convolved = 2 * keys + 2 * values + 2 * heads, 2 * keys + values
        # A key and a query per value head, and the chunk's system of equations.
        rule = 2 * heads * key_width + values + LINEAR_CHUNK * heads
        output = 3 * values * self.element + 2 * values * _FP32  # the rule's, normalized and gated
        return self.all_tokens * ((projected + convolved + rule) * self.element + output + 2 * heads * _FP32)

    def _experts(self, moe: MoeSpec) -> float:
        # Per token: K choices with weights, E router scores, and the sort order of the N new experts' columns.
        choices = moe.topk * (_INT64 + _FP32) + moe.num_experts * _FP32 + moe.num_new_experts * _INT64
        # The balance loss keeps the choices; the LPR loss keeps two logarithms and the language bit.
        lpr = 2 * _FP32 + _BOOL
        stage_losses = {"stage1": moe.topk * _INT64, "stage2": lpr, "sft": lpr}
        choices += stage_losses.get(self.workload.stage, 0)
        inputs = self.hidden + self.expert_ffn  # they give the gradients of weights
        original, new = (2 * self.expert_ffn + inputs * (part in self.trained) for part in _EXPERT_PARTS)
        original += self.hidden * (not self.sums_originals)  # several are one product, and its rows are not kept
        rows = self.original_rows * original + self.new_rows * new
        numbers = (self.original_rows + self.new_rows) * (_INT64 + _FP32)
        return self.tokens * choices + rows * self.element + numbers

    def loss(self, pp_rank: int) -> float:
        """Bytes kept after the last layer, on the last pipeline stage."""
        if pp_rank < self.layout.pp - 1:
            return 0.0
        # The loss masks used for logging, and the input of an output layer that trains.
        trains = trains_output(self.spec, self.trained)
        kept = self._norm() + self.all_tokens * 4 * _FP32
        if not self.fuses_loss:  # softmax, target mask and targets
            inputs = self.tokens * self.hidden * self.element * trains
            return kept + inputs + self.all_tokens * (self.vocabulary * _FP32 + _BOOL + _INT64)
        # The gradients of the input and of new rows, all of which one rank may have.
        rows = min(self.spec.new_tokens.number, self.vocabulary) if trains and self.spec.new_tokens else 0
        return kept + self.all_tokens * (self.hidden * (1 + trains) + rows) * self.element

    def layer_accesses(self, layer: int) -> float:
        """Bytes of hidden states that a layer's other kernels than products read and write, and that are not kept."""
        scales_attention_and_ffn = self.spec.megatron_args.get("residual_multiplier", 1) != 1
        times = 8.0 * scales_attention_and_ffn
        if self.sums_originals and self.spec.is_moe_layer(layer):  # a gather, a sum and an addition, twice
            times += 4 * (1 + self.original_rows / self.tokens) + 6
        return times * self.tokens * self.hidden * self.element

    def loss_accesses(self, pp_rank: int) -> float:
        """Bytes that the loss reads and writes of what it does not keep, in other kernels than products."""
        logits = self.all_tokens * self.vocabulary * (pp_rank == self.layout.pp - 1)
        # Read for their sums, read and overwritten by their gradients; Megatron's kernels were counted in a dry run.
        return logits * (3 * self.element if self.fuses_loss else 9 * _FP32)
