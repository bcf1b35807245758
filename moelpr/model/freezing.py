"""Freeze the parameters that a stage does not train, and report their number."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from moelpr.stages import Part, Stage, part_of, trained_parts


def freeze(model_chunks: list[GPTModel], stage: Stage, train_everything: bool = False) -> list[GPTModel]:
    """Disable gradients of the parameters that the stage does not train; returns the same chunks.

    Call it before the model is wrapped for data parallelism, so that frozen parameters get no gradient buffer and no
    optimizer state.
    """
    trained = trained_parts(stage, train_everything)
    if trained == frozenset(Part):
        return model_chunks
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(part_of(name) in trained)
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None and chunk.config.recompute_granularity is not None:
            # Reentrant recompute computes no gradient unless an input of the checkpointed layers requires one.
            embedding.register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled())
            )
    return model_chunks


def parameter_report(model_chunks: list[GPTModel]) -> str:
    """A table of this rank's parameters, trainable and frozen, by part of the model."""
    counts: dict[Part, list[int]] = {}
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            counts.setdefault(part_of(name), [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    rows = [f"{'part':<16}{'trainable':>16}{'frozen':>16}"]
    rows += [f"{part.value:<16}{trainable:>16,}{frozen:>16,}" for part, (trainable, frozen) in counts.items()]
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows.append(f"{'all':<16}{total[0]:>16,}{total[1]:>16,}")
    return "\n".join(rows)
