"""Which of the layouts that fit comes first: a rule of thumb from counts, not a measurement."""

from collections.abc import Sequence

from moelpr.model_spec import ModelSpec
from moelpr.plan.layouts import Layout, leaves_node
from moelpr.plan.memory import Run
from moelpr.plan.parts import PartSize
from moelpr.stages import Part


def bubble(layout: Layout, num_microbatches: int) -> float:
    """Share of a step in which a pipeline stage waits, with the 1F1B schedule."""
    return (layout.pp - 1) / (num_microbatches + layout.pp - 1)


def relative_time(spec: ModelSpec, parts: Sequence[PartSize], layout: Layout, run: Run) -> float:
    """Time of a step over that of the same arithmetic without recompute and bubble; communication is left out.

    Counts the multiplications by weights: all of them forward, again for the gradient of the input, and for the
    gradient of the weight in what trains (of new experts; a router is nothing beside them).
    """
    assert spec.moe is not None
    numel = dict.fromkeys(Part, 0)
    for size in parts:
        numel[size.part] += size.numel
    one_expert = numel[Part.ORIGINAL_EXPERTS] / spec.moe.num_original_experts  # in every MoE layer
    experts = spec.moe.topk * one_expert  # all have the same size, and every token passes K of them
    new_experts = experts * spec.moe.num_new_experts / spec.moe.num_experts
    others = numel[Part.ATTENTION] + numel[Part.DENSE_FFN]
    output = numel[Part.OUTPUT_LAYER] or numel[Part.EMBEDDING]
    once = 2 * (experts + others + output) + (new_experts if run.stage == "stage1" else 0)
    again = {"none": 0, "selective": experts, "full": experts + others}[layout.recompute]
    return (once + again) / once / (1 - bubble(layout, run.num_microbatches(layout)))


def preference(layout: Layout, time: float, gpus_per_node: int, traffic_bytes: float) -> tuple[float, ...]:
    """Sort key among layouts that fit; the smallest is recommended.

    In this order: the smallest `relative_time`, in twentieths (what is closer is decided by communication); experts
    exchanged inside a node; the model divided over as few ranks as possible; pipeline before tensor parallelism, since
    a stage hands on one tensor where tensor parallelism exchanges one in every layer; the fewest bytes of expert
    traffic; the least time.
    """
    return (
        round(20 * time),
        leaves_node(layout.ep * layout.etp, layout.world, gpus_per_node),
        layout.tp * layout.pp,
        layout.tp,
        traffic_bytes,
        layout.ep * layout.etp,
        time,
    )
