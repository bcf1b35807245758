"""The model to plan for: its spec and the sizes of its parts, from a Hugging Face config.json."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from moelpr.families.families import family_named, read_base, with_new_experts
from moelpr.families.tables import pieces
from moelpr.model_spec import ModelSpec
from moelpr.stages import Part, part_of

# Megatron pads the vocabulary to a multiple of this times the tensor-parallel size (--make-vocab-size-divisible-by).
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class PartSize:
    """All tensors of one part of the model in one layer, or outside the layers.

    Attributes:
        part: the part.
        layer: 0-based; None for embedding, final norm and output layer.
        numel: number of parameters in the full model, without padding of the vocabulary.
    """

    part: Part
    layer: int | None
    numel: int


def upcycled_spec(
    hf_path: Path,
    num_new_experts: int,
    topk: int | None = None,
    moe_layers: list[int] | None = None,
    moe_every_k_layers: int | None = None,
) -> ModelSpec:
    """The spec that hf_to_mcore.py would write for a Hugging Face folder, with bf16 weights.

    Raises:
        UserError: the model is unsupported, or it cannot have such experts.
    """
    family, base = read_base(hf_path)
    spec = with_new_experts(family, base, num_new_experts, topk, moe_layers, moe_every_k_layers)
    return replace(spec, dtype="bfloat16")


def model_parts(spec: ModelSpec) -> tuple[PartSize, ...]:
    """The sizes of the model's parts by layer, counted in the name table of its family."""
    sums: dict[tuple[int | None, Part], int] = {}
    for piece in pieces(family_named(spec.family).table, spec):
        names = piece.key.split(".")
        layer = int(names[2]) if names[:2] == ["decoder", "layers"] else None
        place = (layer, part_of(piece.key))
        sums[place] = sums.get(place, 0) + sum(map(math.prod, piece.hf_shapes))
    return tuple(PartSize(part, layer, numel) for (layer, part), numel in sums.items())


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of the embedding as the trainer pads them for `tp` tensor-parallel ranks."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
