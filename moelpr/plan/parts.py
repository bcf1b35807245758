"""The model's tensors, grouped by how a layout divides them over ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

# Megatron pads the vocabulary to a multiple of this times the tensor-parallel size (--make-vocab-size-divisible-by).
VOCABULARY_MULTIPLE = 128


class Kind(Enum):
    """What a tensor is part of; decides what divides it and what trains it."""

    EMBEDDING = "embedding"
    OUTPUT = "output layer"
    TENSOR_PARALLEL = "attention and dense FFNs"
    REPLICATED = "norms"
    ORIGINAL_EXPERTS = "original experts"
    ROUTER = "routers"
    NEW_EXPERTS = "new experts"


@dataclass(frozen=True)
class Part:
    """All tensors of one kind in one layer (or at one end of the model).

    layer: 0-based; None for embedding, final norm and output layer.
    numel: parameters of the whole model, without padding of the vocabulary.
    """

    kind: Kind
    layer: int | None
    numel: int


def parts_of(tensors: Iterable[tuple[str, int]]) -> tuple[Part, ...]:
    """Sum tensors (Megatron checkpoint key, parameters in it) by layer and kind."""
    sums: dict[tuple[int | None, Kind], int] = {}
    for key, numel in tensors:
        place = (_layer_of(key), _kind_of(key))
        sums[place] = sums.get(place, 0) + numel
    return tuple(Part(kind, layer, numel) for (layer, kind), numel in sums.items())


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def _layer_of(key: str) -> int | None:
    words = key.split(".")
    return int(words[2]) if words[:2] == ["decoder", "layers"] else None


def _kind_of(key: str) -> Kind:
    if "layernorm" in key or "layer_norm" in key:
        return Kind.REPLICATED
    by_name = {
        ".mlp.router.": Kind.ROUTER,
        ".mlp.original_experts.": Kind.ORIGINAL_EXPERTS,
        ".mlp.experts.": Kind.NEW_EXPERTS,
        "embedding.": Kind.EMBEDDING,
        "output_layer.": Kind.OUTPUT,
    }
    return next((kind for name, kind in by_name.items() if name in key), Kind.TENSOR_PARALLEL)
