"""Bytes that experts make a rank send in a step. Rows of original experts never travel."""

from dataclasses import dataclass

from moelpr.model_spec import ModelSpec
from moelpr.plan.layouts import Layout
from moelpr.plan.memory import WEIGHT_BYTES, Routing, Run

_GATE_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes per rank and step.

    all_to_all: rows of new experts sent to other expert-parallel ranks and back, forward and backward.
    expert_tensor: rows received from the other expert-tensor-parallel ranks and partial results sent to them.
    """

    all_to_all: int
    expert_tensor: int

    @property
    def total(self) -> int:
        return self.all_to_all + self.expert_tensor


def expert_traffic(spec: ModelSpec, layout: Layout, run: Run, routing: Routing | None = None) -> Traffic:
    """Traffic of a rank on the stage with the most MoE layers; `routing`: uniform unless given.

    Of the rows of new experts, (EP - 1)/EP leave the rank (new experts are chosen equally often). Each goes out with
    its gate weight in fp32 and comes back as a row; the backward pass does the same, and a recomputed MoE layer
    repeats the forward pass. With ETP > 1 each rank gathers the rows of ETP ranks, for the original experts every
    token once with its m gate weights, and scatters the sums.
    """
    assert spec.moe is not None
    routing = routing or Routing.uniform(spec.moe)
    row = spec.megatron_args["hidden_size"] * WEIGHT_BYTES[run.dtype]
    passes = 2 if layout.recompute == "none" else 3
    tokens = run.seq_length * run.micro_batch_size / layout.tp
    times = run.num_microbatches(layout) * _most_moe_layers(spec, layout.pp) * passes
    new = tokens * routing.new_rows * (row + _GATE_WEIGHT_BYTES + row)
    original = tokens * (row + spec.moe.num_original_experts * _GATE_WEIGHT_BYTES + row)
    return Traffic(
        all_to_all=round(times * new * (layout.ep - 1) / layout.ep),
        expert_tensor=round(times * (new + original) * (layout.etp - 1)),
    )


def _most_moe_layers(spec: ModelSpec, pp: int) -> int:
    assert spec.moe is not None
    per_stage = spec.megatron_args["num_layers"] // pp
    return max(sum(layer // per_stage == stage for layer in spec.moe.layers) for stage in range(pp))
