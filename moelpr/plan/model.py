"""The model to be planned for, from a Hugging Face config.json alone."""

import math
from dataclasses import replace
from pathlib import Path

from moelpr.families.families import family_named, read_base, with_new_experts
from moelpr.families.tables import pieces
from moelpr.model_spec import ModelSpec
from moelpr.plan.parts import PartSize, parts_of


def upcycled_spec(
    hf_path: Path,
    num_new_experts: int,
    topk: int | None = None,
    moe_layers: list[int] | None = None,
    moe_every_k_layers: int | None = None,
) -> ModelSpec:
    """What hf_to_mcore.py would make of the folder. UserError for an unsupported model or impossible experts."""
    family, base = read_base(hf_path)
    spec = with_new_experts(family, base, num_new_experts, topk, moe_layers, moe_every_k_layers)
    return replace(spec, dtype="bfloat16")


def model_parts(spec: ModelSpec) -> tuple[PartSize, ...]:
    """The model's tensors, counted in the name table of its family."""
    table = family_named(spec.family).table
    return parts_of((piece.key, sum(math.prod(shape) for shape in piece.hf_shapes)) for piece in pieces(table, spec))
