"""The parts of a model, which part a parameter belongs to, and which parts each stage trains."""

from enum import Enum
from typing import Literal, get_args

Stage = Literal["dense", "ffn", "stage0", "stage1", "stage2", "sft"]
MoeStage = Literal["stage1", "stage2"]  # the paper's
# The experts that tokens can choose in stage 1: all (the paper), or only those that it trains.
Stage1Experts = Literal["all", "new"]
MOE_STAGES: tuple[Stage, ...] = (*get_args(MoeStage), "sft")
DENSE_STAGES: tuple[Stage, ...] = ("dense", "ffn")  # for models without experts

# Why no MoE stage trains a model in which a token uses one expert.
UNTRAINED_ROUTERS = (
    "with K = 1 every gate weight is 1, so routers get no gradient; train the FFNs of the dense model (stage ffn), and "
    "let moelpr model combine find the routers, or use --topk 2 or more"
)

STAGE_HELP: dict[Stage, str] = {
    "dense": "(full training): train every parameter of a dense model (a base from scratch, or full fine-tuning)",
    "ffn": "(FFNs only): train the FFNs of a dense model, what MoE-LPR trains, but without experts",
    "stage0": "(new tokens): train only the embedding and output rows of new tokens on expanded-language text",
    "stage1": "(post-pretraining): train the new experts and the routers on expanded-language text",
    "stage2": "(review): train the routers only, on a little replay text of all languages",
    "sft": "(chat): train the new experts and the routers on conversations in all languages",
}


class Part(Enum):
    """A part of the model; the value is its name in reports."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE_FFN = "dense FFN"
    NORM = "norms"
    ORIGINAL_EXPERTS = "original experts"
    NEW_EXPERTS = "new experts"
    ROUTER = "routers"
    OUTPUT_LAYER = "output layer"


# The first pattern that occurs in a name decides: a norm inside attention is a norm.
_PATTERNS = {
    "layernorm": Part.NORM,
    "layer_norm": Part.NORM,
    ".out_norm.": Part.NORM,
    ".mlp.router.": Part.ROUTER,
    ".mlp.original_experts.": Part.ORIGINAL_EXPERTS,
    ".mlp.experts.": Part.NEW_EXPERTS,
    "self_attention": Part.ATTENTION,
    "embedding": Part.EMBEDDING,
    "output_layer": Part.OUTPUT_LAYER,
}

# The parts with a row per token, of which stage 0 and --train-new-embeddings train those of new tokens.
VOCABULARY_PARTS = frozenset({Part.EMBEDDING, Part.OUTPUT_LAYER})
# On a GPU, the loss is computed in chunks of so many logits per rank (half a GiB in bf16), unless all rows train.
CHUNK_LOGITS = 1 << 28

_TRAINED: dict[Stage, frozenset[Part]] = {
    "dense": frozenset(Part),
    "ffn": frozenset({Part.DENSE_FFN}),
    "stage0": VOCABULARY_PARTS,
    "stage1": frozenset({Part.NEW_EXPERTS, Part.ROUTER}),
    "stage2": frozenset({Part.ROUTER}),
    "sft": frozenset({Part.NEW_EXPERTS, Part.ROUTER}),
}


def part_of(name: str) -> Part:
    """The part that a Megatron parameter name or checkpoint key belongs to."""
    return next((part for pattern, part in _PATTERNS.items() if pattern in name), Part.DENSE_FFN)


def trained_parts(stage: Stage, train_everything: bool = False, train_new_embeddings: bool = False) -> frozenset[Part]:
    """The parts that a stage trains; everything else is frozen (paper, sections 3.2 and 3.3).

    Of embedding and output layer, stage 0 and `train_new_embeddings` train only the rows of new tokens.
    """
    if train_everything:
        return frozenset(Part)
    return _TRAINED[stage] | (_TRAINED["stage0"] if train_new_embeddings else frozenset())


def trains_new_rows_only(stage: Stage, train_new_embeddings: bool = False) -> bool:
    """Whether embedding and output layer train, but only in the rows of new tokens."""
    return stage == "stage0" or train_new_embeddings
