"""The model's tensors, grouped by how a layout divides them over ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

from moelpr.stages import Part, part_of

# Megatron pads the vocabulary to a multiple of this times the tensor-parallel size (--make-vocab-size-divisible-by).
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class PartSize:
    """All tensors of one part of the model in one layer (or at one end of the model).

    layer: 0-based; None for embedding, final norm and output layer.
    numel: parameters of the whole model, without padding of the vocabulary.
    """

    part: Part
    layer: int | None
    numel: int


def parts_of(tensors: Iterable[tuple[str, int]]) -> tuple[PartSize, ...]:
    """Sum tensors (Megatron checkpoint key, parameters in it) by layer and part."""
    sums: dict[tuple[int | None, Part], int] = {}
    for key, numel in tensors:
        place = (_layer_of(key), part_of(key))
        sums[place] = sums.get(place, 0) + numel
    return tuple(PartSize(part, layer, numel) for (layer, part), numel in sums.items())


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def _layer_of(key: str) -> int | None:
    words = key.split(".")
    return int(words[2]) if words[:2] == ["decoder", "layers"] else None
