"""Freeze the parameters that a stage does not train, and report their number."""

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel

from moelpr.base.text_tables import table_text
from moelpr.model.layers.new_rows import rows_that_train, train_new_rows_only
from moelpr.model.model_spec import NewTokens
from moelpr.model.stages import Part, Stage, part_of, trained_parts, trains_new_rows_only


def freeze(
    model_chunks: list[HybridModel],
    stage: Stage,
    train_everything: bool = False,
    train_new_embeddings: bool = False,
    new_tokens: NewTokens | None = None,
) -> list[HybridModel]:
    """Disable gradients of the parameters that the stage does not train; returns the same chunks.

    Call it before the model is wrapped for data parallelism, so that frozen parameters get no gradient buffer and no
    optimizer state. The embedding and the output layer train whole or only in the rows of `new_tokens`.
    """
    trained = trained_parts(stage, train_everything, train_new_embeddings)
    if trained == frozenset(Part):
        return model_chunks
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(part_of(name) in trained)
        embedding = getattr(chunk, "embedding", None)
        recomputes = chunk.config.recompute_granularity is not None
        if embedding is not None and recomputes and any(weight.requires_grad for weight in chunk.parameters()):
            # Reentrant recompute computes no gradient unless an input of the checkpointed layers requires one.
            embedding.register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled())
            )
    if trains_new_rows_only(stage, train_new_embeddings):
        assert new_tokens is not None, "checked with the arguments"
        train_new_rows_only(model_chunks, new_tokens)
    return model_chunks


def parameter_report(model_chunks: list[HybridModel]) -> str:
    """A table of this rank's parameters, trainable and frozen, by part of the model."""
    counts: dict[Part, list[int]] = {}
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            trainable = parameter[rows_that_train(parameter)].numel() if parameter.requires_grad else 0
            count = counts.setdefault(part_of(name), [0, 0])
            count[0] += trainable
            count[1] += parameter.numel() - trainable
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    by_name = {part.value: count for part, count in counts.items()} | {"all": total}
    rows = [[name, *(f"{number:,}" for number in count)] for name, count in by_name.items()]
    return table_text(["part", "trainable", "frozen"], rows)
