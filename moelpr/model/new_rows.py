"""Train only the rows of new tokens in the embedding and in the output layer; all other rows keep their bits.

Gradients exist for the whole matrices. Those of old rows are set to zero once per step, when Megatron has summed them
over the data-parallel ranks and, for tied embeddings, over both ends of the pipeline, and before it clips them. Adam
then leaves these rows as they are: their moments stay zero, and they have no weight decay (`hooks.without_weight_decay`).
"""

from functools import wraps
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel

from moelpr.model_spec import NewTokens
from moelpr.stages import Part, part_of

# Attribute of a parameter of which only some rows train: their slice on this tensor-parallel rank.
ROWS = "rows_that_train"


def train_new_rows_only(model_chunks: list[GPTModel], new_tokens: NewTokens) -> None:
    """Mark the matrices of the vocabulary, and have Megatron zero the gradients of their old rows in each step."""
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            if part_of(name) in (Part.EMBEDDING, Part.OUTPUT_LAYER):
                num_rows = len(parameter)
                first = parallel_state.get_tensor_model_parallel_rank() * num_rows
                start, end = (min(max(id - first, 0), num_rows) for id in (new_tokens.first, new_tokens.end))
                setattr(parameter, ROWS, slice(start, end))
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
                parameter.main_grad[: rows.start].zero_()
                parameter.main_grad[rows.stop :].zero_()
