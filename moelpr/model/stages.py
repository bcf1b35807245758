"""What trains in each stage, and a report that counts it."""

from collections import defaultdict
from typing import Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

Stage = Literal["dense", "stage1", "stage2"]

STAGE_HELP = {
    "dense": "train every parameter of a dense model (a base from scratch, or full fine-tuning)",
    "stage1": "post-pretrain: train the new experts and the routers on expanded-language text",
    "stage2": "review: train the routers alone on a little replay text of all languages",
}

_ROUTER = ".mlp.router."
_NEW_EXPERTS = ".mlp.experts."
_TRAINABLE = {"stage1": (_ROUTER, _NEW_EXPERTS), "stage2": (_ROUTER,)}


def freeze(model_chunks: list[GPTModel], stage: Stage, train_everything: bool = False) -> list[GPTModel]:
    """Leave gradients on for what the stage trains and off for everything else; returns the same chunks.

    Runs before the model is wrapped for data parallelism, so that frozen parameters get no gradient buffer and no
    optimizer state.
    """
    if stage == "dense" or train_everything:
        return model_chunks
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(any(part in name for part in _TRAINABLE[stage]))
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None and chunk.config.recompute_granularity is not None:
            # Reentrant recompute gives no gradient at all when no input of the checkpointed layers requires one.
            embedding.register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled())
            )
    return model_chunks


def parameter_report(model_chunks: list[GPTModel]) -> str:
    """A table of this rank's parameters, trainable and frozen, by part of the model."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            counts[_part_of_model(name)][0 if parameter.requires_grad else 1] += parameter.numel()
    rows = [f"{'part':<16}{'trainable':>16}{'frozen':>16}"]
    rows += [f"{part:<16}{trainable:>16,}{frozen:>16,}" for part, (trainable, frozen) in counts.items()]
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows.append(f"{'all':<16}{total[0]:>16,}{total[1]:>16,}")
    return "\n".join(rows)


def _part_of_model(parameter_name: str) -> str:
    parts = {
        _ROUTER: "routers",
        _NEW_EXPERTS: "new experts",
        ".mlp.original_experts.": "original experts",
        "self_attention": "attention",
        "layernorm": "norms",
        "embedding": "embedding",
        "output_layer": "output layer",
    }
    return next((label for part, label in parts.items() if part in parameter_name), "dense FFN")
