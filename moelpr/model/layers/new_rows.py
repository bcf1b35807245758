"""Train only the rows of new tokens in the embedding and in the output layer; all other rows keep their bits.

Gradients exist for the whole matrices. Those of old rows are set to zero once per step, when Megatron has summed them
over the data-parallel ranks and, for tied embeddings, over both ends of the pipeline, and before it clips them. Adam
then leaves these rows as they are: their moments stay zero, and nothing decays (`hooks.without_weight_decay`).

The output layer computes the gradient of new rows only: for all rows, it costs as much as the logits.
"""

from functools import partial, wraps
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from moelpr.model.model_spec import NewTokens
from moelpr.model.stages import VOCABULARY_PARTS, part_of

# Attribute of a parameter of which only some rows train: their slice on this tensor-parallel rank.
ROWS = "rows_that_train"


def train_new_rows_only(model_chunks: list[HybridModel], new_tokens: NewTokens) -> None:
    """Mark the matrices of the vocabulary, and have Megatron zero the gradients of their old rows in each step."""
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            if part_of(name) in VOCABULARY_PARTS:
                num_rows = len(parameter)
                first = parallel_state.get_tensor_model_parallel_rank() * num_rows
                start, end = (min(max(id - first, 0), num_rows) for id in (new_tokens.first, new_tokens.end))
                setattr(parameter, ROWS, slice(start, end))
        if chunk.post_process:
            # Megatron's method of this name calls its linear functions with these arguments.
            chunk.output_layer._forward_impl = _linear_with_new_rows
        chunk.config.finalize_model_grads_func = _finalize_and_zero_old_rows


def rows_that_train(parameter: torch.nn.Parameter) -> slice:
    """The rows of a trainable parameter that train; all of them unless it is marked."""
    rows: slice = getattr(parameter, ROWS, slice(None))
    return rows


@wraps(finalize_model_grads)
def _finalize_and_zero_old_rows(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        for parameter in chunk.parameters():
            if (rows := getattr(parameter, ROWS, None)) is not None:
                # Under the distributed optimizer, this rank's shard is what counts; the rest is no longer needed.
                gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
                gradient[: rows.start].zero_()
                gradient[rows.stop :].zero_()


def _linear_with_new_rows(
    input: Tensor, weight: torch.nn.Parameter, sequence_parallel: bool, tp_group: Any, **options: Any
) -> Tensor:
    """Megatron's linear function of the output layer, with gradients of the input and of the rows that train."""
    options |= {"sequence_parallel": sequence_parallel, "tp_group": tp_group}
    logits_SBV = linear_with_frozen_weight(input=input, weight=weight.detach(), **options)
    gather = partial(gather_from_sequence_parallel_region, group=tp_group) if sequence_parallel else None
    output: Tensor = _GradientOfRows.apply(logits_SBV, input.detach(), weight, rows_that_train(weight), gather)
    return output


class _GradientOfRows(torch.autograd.Function):
    """Returns the logits, and backward adds the gradient of some rows of the weight; that of others is zero."""

    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, input_SBH: Tensor, weight_VH: Tensor, rows: slice, gather: Any) -> Tensor:
        ctx.save_for_backward(input_SBH)
        ctx.shape, ctx.rows, ctx.gather = weight_VH.shape, rows, gather
        ctx.mark_dirty(logits_SBV)  # unchanged, but a view could not be masked in place
        return logits_SBV

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (input_SBH,), (gradient_SBV,) = ctx.saved_tensors, gradients
        if ctx.gather is not None:
            input_SBH = ctx.gather(input_SBH)
        gradient_VH = input_SBH.new_zeros(ctx.shape)
        gradient_VH[ctx.rows] = gradient_SBV[..., ctx.rows].flatten(0, 1).T @ input_SBH.flatten(0, 1)
        return gradient_SBV, None, gradient_VH, None, None
