"""The model to be planned for, from a Hugging Face config.json alone."""

import math
from pathlib import Path

from checkpoint_convert.families import family_named, family_of, pieces
from checkpoint_convert.hf_folder import read_config
from checkpoint_convert.hf_to_mcore import choose_layers, read_shape
from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.plan.parts import Part, parts_of


def upcycled_spec(
    hf_path: Path,
    num_new_experts: int,
    topk: int = 2,
    moe_layers: list[int] | None = None,
    moe_every_k_layers: int | None = None,
) -> ModelSpec:
    """What hf_to_mcore.py would make of the folder. UserError for an unsupported model or impossible experts."""
    family = family_of(read_config(hf_path))
    megatron_args = read_shape(hf_path, family)
    layers = choose_layers(megatron_args["num_layers"], moe_layers, moe_every_k_layers)
    spec = ModelSpec(family.name, "bfloat16", megatron_args, MoeSpec(num_new_experts, topk, layers))
    spec.check()
    return spec


def model_parts(spec: ModelSpec) -> tuple[Part, ...]:
    """The model's tensors, counted in the name table of its family."""
    table = family_named(spec.family).table
    return parts_of((piece.key, sum(math.prod(shape) for shape in piece.hf_shapes)) for piece in pieces(table, spec))
