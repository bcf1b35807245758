"""Bytes per rank and step that expert parallelism transfers. Rows of original experts never leave their rank."""

from dataclasses import dataclass

from moelpr.model_spec import ModelSpec
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import WEIGHT_BYTES, Routing, Workload

_GATE_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Expert traffic, in bytes per rank and step.

    Attributes:
        all_to_all: rows of new experts sent to other expert-parallel ranks and back, forward and backward.
        expert_tensor: rows received from, and partial results sent to, the other expert-tensor-parallel ranks.
    """

    all_to_all: int
    expert_tensor: int

    @property
    def total(self) -> int:
        return self.all_to_all + self.expert_tensor


def expert_traffic(
    spec: ModelSpec, layout: PlannedLayout, workload: Workload, routing: Routing | None = None
) -> Traffic:
    """The traffic of a rank on the pipeline stage with the most MoE layers.

    A fraction (EP - 1)/EP of the rows of new experts leaves the rank (new experts are chosen equally often). Each row
    is sent with its gate weight in fp32 and returned as a row; the backward pass does the same, and a recomputed MoE
    layer repeats the forward pass. With ETP > 1 each rank gathers the rows of ETP ranks (for the original experts each
    token once, with its m gate weights) and scatters the sums.

    `routing` is `Routing.uniform` by default.
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
