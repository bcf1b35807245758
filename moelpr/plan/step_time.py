"""The cost of a training step in a layout: operations, bytes that ranks exchange, and time on known GPUs.

docs/design/planner.md gives the equations, the assumptions and how far the predictions are off.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Part
from moelpr.plan.gpus import GPUS, Cluster
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import (
    HOST_BYTES,
    LINEAR_CHUNK,
    WEIGHT_BYTES,
    Activations,
    Parts,
    RankMemory,
    Routing,
    Workload,
    held_on_stage,
    layers_of_stage,
    needs_input_gradient,
    padded_vocabulary,
    trains_output,
)

# Fractions of the data sheets' rates that large matrix products, other kernels, and collectives reach.
MATMUL_EFFICIENCY = 0.5
MEMORY_EFFICIENCY = 0.6
LINK_EFFICIENCY = 0.6
# Bytes per second of Adam on the host, and of its bus.
HOST_MEMORY_BANDWIDTH, HOST_LINK_BANDWIDTH = 50e9, 32e9
# How far predicted tokens/s of published runs are off (tests/unit/plan/test_published.py): of those that the fractions
# were fitted to, from and to, and of the paper's, which they were not.
FITTED_ERROR, PAPER_ERROR = (-0.03, 0.06), 0.35
PREDICTION_NOTE = (
    "Predicted tokens/s are {:+.0%} to {:+.0%} off for the published runs that they were fitted to, and {:+.0%}\nfor "
    "the paper's, the only one of MoE-LPR. None has been compared with a run of moelpr (docs/design/planner.md)."
).format(*FITTED_ERROR, PAPER_ERROR)

_GATE_WEIGHT_BYTES = 4
# Accesses to each byte of an activation: written forward and read backward; its gradient written and read.
_ACCESSES = 4


class Flops(NamedTuple):
    """Operations of one micro-batch on a rank, multiply and add counting as two: once, and repeated by recompute."""

    once: float
    again: float


class Traffic(NamedTuple):
    """Expert traffic, in bytes per rank and step."""

    all_to_all: int  # rows of new experts sent to other expert-parallel ranks and back, forward and backward
    expert_tensor: int  # rows received from, and partial results sent to, the other expert-tensor-parallel ranks


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step, on the slowest pipeline stage."""

    products_s: float  # matrix products
    memory_s: float  # kernels limited by memory bandwidth, and the optimizer, which may be on the host
    experts_s: float  # expert traffic
    layers_s: float  # exchanges of tensor-parallel ranks and of pipeline stages
    gradients_s: float  # reducing gradients and gathering weights, beyond what overlaps with a micro-batch's work
    bubble_s: float  # waiting for the first and the last micro-batch of a pipeline

    @property
    def total_s(self) -> float:
        return self.products_s + self.memory_s + self.experts_s + self.layers_s + self.gradients_s + self.bubble_s

    def tokens_per_s(self, workload: Workload, cluster: Cluster) -> float:
        """Tokens per second and GPU."""
        return workload.global_batch_size * workload.seq_length / self.total_s / cluster.gpus


def stage_flops(
    spec: ModelSpec,
    parts: Parts,
    layout: PlannedLayout,
    workload: Workload,
    pp_rank: int,
    routing: Routing | None = None,
) -> Flops:
    """Count the matrix products of a micro-batch on a rank of a pipeline stage; norms and softmax are excluded.

    Forward, each weight is multiplied once per token or row, and attention computes the causal half of its scores and
    values. Backward, a product costs as much again for the gradient of its weight if that trains, and for the gradient
    of its input (attention: of both) if something trained is below. In the first MoE layer nothing is, and its new
    experts need only the gradient of their hidden rows, a third; so do the FFNs of the first layer in the stage ffn.
    """
    trained = workload.trained
    shape = spec.megatron_args
    tokens = workload.seq_length * workload.micro_batch_size / layout.tp
    full = 2 * tokens * workload.seq_length * shape["num_attention_heads"] * shape["kv_channels"]
    sizes = (shape.get(f"linear_{name}", 0) for name in ("num_value_heads", "key_head_dim", "value_head_dim"))
    linear = linear_attention_flops(*sizes)
    rows: dict[Part, float] = {Part.NORM: 0}  # per token, and per expert
    if spec.moe is not None:
        routing = routing or Routing.uniform(spec.moe, workload.stage1_experts)
        rows[Part.ORIGINAL_EXPERTS] = routing.original_rows / spec.moe.num_original_experts
        rows[Part.NEW_EXPERTS] = routing.new_rows / spec.moe.num_new_experts
    once = again = 0.0
    for layer in layers_of_stage(spec, layout, pp_rank):
        core = full if not spec.is_linear_layer(layer) else tokens * linear
        products = {part: 2 * tokens * rows.get(part, 1) * parts.get((layer, part), 0) for part in Part}
        forward = sum(products.values()) + core
        once += forward + sum(products[part] for part in trained)
        if needs_input_gradient(spec, layout, layer, pp_rank, trained):
            once += forward + core
        else:
            once += sum(products[part] for part in trained & {Part.NEW_EXPERTS, Part.DENSE_FFN}) / 3
        if layout.recompute == "full":
            again += forward
        elif layout.recompute == "selective" and spec.is_moe_layer(layer):
            again += forward - core - products[Part.ATTENTION]
    if pp_rank == layout.pp - 1:
        num_rows = padded_vocabulary(shape["vocab_size"], layout.tp) / layout.tp
        trained_rows = num_rows
        if spec.new_tokens and trained != frozenset(Part):  # only their rows get a gradient; one rank may have all
            trained_rows = min(spec.new_tokens.number, num_rows)
        rows_per_token = 2 * num_rows + (trained_rows if trains_output(spec, trained) else 0)
        once += 2 * tokens * layout.tp * shape["hidden_size"] * rows_per_token
    return Flops(once, again)


def linear_attention_flops(heads: int, key: int, value: int) -> int:
    """The products of the gated delta rule per token: within its chunk, and with the state, which is [key, value]."""
    within = LINEAR_CHUNK * (4 * key + 2 * value + key + value)  # two of keys, one of values, and the triangular system
    return heads * (within + 6 * key * value)


def bubble(layout: PlannedLayout, num_microbatches: int) -> float:
    """Fraction of a step that a pipeline stage waits, with the 1F1B schedule, of virtual stages if it has some."""
    return (layout.pp - 1) / (layout.vpp * num_microbatches + layout.pp - 1)


def expert_traffic(
    spec: ModelSpec, layout: PlannedLayout, workload: Workload, routing: Routing | None = None
) -> Traffic:
    """The traffic of a rank on the pipeline stage with the most MoE layers.

    A fraction (EP - 1)/EP of the rows of new experts leaves the rank (new experts are chosen equally often). Each row
    is sent with its gate weight in fp32 and returned as a row; the backward pass does the same, and a recomputed MoE
    layer repeats the forward pass. With ETP > 1 each rank gathers the rows of ETP ranks (for the original experts each
    token once, with its m gate weights) and scatters the sums. `routing` is `Routing.uniform` by default.
    """
    if spec.moe is None:
        return Traffic(0, 0)
    routing = routing or Routing.uniform(spec.moe, workload.stage1_experts)
    row = spec.megatron_args["hidden_size"] * WEIGHT_BYTES[workload.dtype]
    stages = (layers_of_stage(spec, layout, stage) for stage in range(layout.pp))
    moe_layers = max(sum(map(spec.is_moe_layer, layers)) for layers in stages)
    passes = 2 if layout.recompute == "none" else 3
    times = workload.num_microbatches(layout) * moe_layers * passes
    tokens = workload.seq_length * workload.micro_batch_size / layout.tp
    new = tokens * routing.new_rows * (row + _GATE_WEIGHT_BYTES + row)
    original = tokens * (row + spec.moe.num_original_experts * _GATE_WEIGHT_BYTES + row)
    return Traffic(
        all_to_all=round(times * new * (layout.ep - 1) / layout.ep),
        expert_tensor=round(times * (new + original) * (layout.etp - 1)),
    )


def step_time(
    spec: ModelSpec,
    parts: Parts,
    layout: PlannedLayout,
    workload: Workload,
    cluster: Cluster,
    memories: list[RankMemory],
    routing: Routing | None = None,
) -> StepTime:
    """The predicted time of a step; on GPUs that the planner does not know, as if they were A100s.

    `memories` are the layout's `stage_memories`; the other arguments are those of `stage_flops`.
    """
    links = _Links(layout, cluster)
    num_microbatches = workload.num_microbatches(layout)
    traffic = expert_traffic(spec, layout, workload, routing)
    experts_s = links.all_to_all_s(traffic.all_to_all) + links.node_s(traffic.expert_tensor)
    activations = Activations(spec, layout, workload, routing)
    tokens = workload.seq_length * workload.micro_batch_size / layout.tp
    hidden_bytes = tokens * spec.megatron_args["hidden_size"] * WEIGHT_BYTES[workload.dtype]

    def of_stage(pp_rank: int) -> StepTime:
        memory = memories[pp_rank]
        flops = stage_flops(spec, parts, layout, workload, pp_rank, routing)
        products_s = sum(flops) / (links.gpu.flops * MATMUL_EFFICIENCY)
        # Weights are read forward and backward; each micro-batch adds to the gradients.
        accessed = activations.loss_accesses(pp_rank) + _ACCESSES * activations.loss(pp_rank)
        accessed += 2 * memory.parameter_bytes + 2 * memory.gradient_bytes
        accessed += sum(map(activations.layer_accesses, layers_of_stage(spec, layout, pp_rank)))
        accessed += sum(_ACCESSES * kept + 1.5 * _ACCESSES * inside for kept, inside in activations.layers(pp_rank))
        # Adam reads and writes its state; gradients are set to 0, read for their norm, and read again.
        update = 2 * memory.optimizer_bytes + 3 * memory.gradient_bytes
        update_s = links.memory_s(update) + host_update_s(memory)
        # Sequence parallelism gathers and scatters around attention and dense FFNs, forward and backward.
        layers = layers_of_stage(spec, layout, pp_rank)
        exchanges = len(layers) + sum(not spec.is_moe_layer(layer) for layer in layers)
        # A layer that trains gathers its input a second time, for the gradient of its weights.
        collectives = exchanges * ((6 if layout.recompute == "full" else 4) + (Part.ATTENTION in workload.trained))
        layers_s = links.node_s(collectives * hidden_bytes * (layout.tp - 1))
        layers_s += links.pipeline_s(2 * layout.vpp * hidden_bytes) if layout.pp > 1 else 0
        memory_s = links.memory_s(accessed)
        held = held_on_stage(spec, parts, layout, pp_rank)
        gathered = WEIGHT_BYTES[workload.dtype] if layout.distributed_optimizer else workload.gradient_bytes
        reduce_s = 0.0
        for part in workload.trained - {Part.ROUTER, Part.NORM}:  # these are small
            reduce_s += links.data_s(held.get(part, 0) * (workload.gradient_bytes + gathered), part is Part.NEW_EXPERTS)
        return StepTime(
            products_s=num_microbatches * products_s,
            memory_s=num_microbatches * memory_s + update_s,
            experts_s=experts_s,
            layers_s=num_microbatches * layers_s,
            gradients_s=max(0.0, reduce_s - products_s - memory_s),
            bubble_s=(layout.pp - 1) / layout.vpp * (products_s + memory_s + layers_s + experts_s / num_microbatches),
        )

    return max(map(of_stage, range(layout.pp)), key=lambda stage: stage.total_s)


def host_update_s(memory: RankMemory) -> float:
    """Adam on the host reads four numbers of a parameter and writes three; a gradient goes there, a weight back."""
    parameters = memory.host_bytes / HOST_BYTES
    return 4 * parameters * (7 / HOST_MEMORY_BANDWIDTH + 2 / (HOST_LINK_BANDWIDTH * LINK_EFFICIENCY))


class _Links:
    """Seconds for bytes of a rank, by who exchanges them. Ranks are numbered TP or ETP, EP, DP, PP, innermost first."""

    def __init__(self, layout: PlannedLayout, cluster: Cluster) -> None:
        self.layout, self.cluster, self.gpu = layout, cluster, cluster.gpu or GPUS["a100-80"]

    def memory_s(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.memory_bandwidth * MEMORY_EFFICIENCY)

    def node_s(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.node_bandwidth * LINK_EFFICIENCY)

    def network_s(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.network_bandwidth * LINK_EFFICIENCY)

    def pipeline_s(self, num_bytes: float) -> float:
        is_one_node = self.cluster.gpus <= self.cluster.gpus_per_node
        return self.node_s(num_bytes) if is_one_node else self.network_s(num_bytes)

    def all_to_all_s(self, num_bytes: float) -> float:
        """Both networks work at the same time."""
        size = self.layout.ep
        if size == 1:
            return 0.0
        outside = (size - self._ranks_in_node(size, self.layout.etp)) / (size - 1)
        return max(self.node_s(num_bytes * (1 - outside)), self.network_s(num_bytes * outside))

    def data_s(self, num_bytes: float, is_expert: bool) -> float:
        """A ring over the ranks that hold the same parameters; it leaves a node through all its ranks' adapters."""
        layout = self.layout
        size, stride = (layout.expert_dp, layout.ep * layout.etp) if is_expert else (layout.dp, layout.tp)
        in_node = self._ranks_in_node(size, stride)
        moved = num_bytes * (size - 1) / size
        return self.node_s(moved) if in_node == size else max(self.node_s(moved), self.network_s(moved / in_node))

    def _ranks_in_node(self, size: int, stride: int) -> int:
        """How many ranks share a node with the worst-placed one, of a group of `size` ranks that are `stride` apart.

        Among groups of 5 on nodes of 8, one has a single rank in its second node.
        """
        if not self.cluster.leaves_node(size * stride):
            return size
        return math.gcd(size, self.cluster.gpus_per_node // stride or 1)
