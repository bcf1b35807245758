"""One forward pass of a micro-batch: data, model, next-token loss; Megatron's schedule calls it."""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from moelpr.data.batch import Batch, BatchReader, GlobalCounts
from moelpr.model.router import LPRLossNormalizer

_reader = BatchReader()


def forward_step(data_iterator: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module) -> tuple[Tensor, partial]:
    """Output of this pipeline stage and the function that turns the last stage's output into the loss."""
    config = get_model_config(model)
    num_microbatches = get_num_microbatches() if model.training else 1
    batch = _reader.next(data_iterator, num_microbatches, owner=model)
    LPRLossNormalizer.set_weight(lpr_token_weight(batch.counts, num_microbatches, config.calculate_per_token_loss))
    output = model(
        batch.tokens,
        batch.position_ids,
        # What keeps attention within documents, and is causal by itself without.
        attention_mask=batch.position_ids if config.dataloader_inter_document_masking else None,
        labels=batch.labels,
        padding_mask=_bits_for_this_stage(batch, model),
    )
    return output, partial(next_token_loss, batch)


def next_token_loss(batch: Batch, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of losses, number of tokens, reports), reports being [sum, count] pairs that Megatron adds up and divides.

    The loss is also reported split by the language of the predicted token; a language group without tokens is NaN.
    """
    losses, mask, is_original = (tensor.flatten() for tensor in (losses_BS, batch.loss_mask, batch.is_original_label))
    losses = losses.float() * mask
    num_tokens = mask.sum().to(torch.int)

    def report(weight: Tensor) -> Tensor:
        return torch.stack([(losses * weight).sum(), (mask * weight).sum()]).detach()

    original = is_original.float()
    return (
        losses.sum(),
        num_tokens,
        {
            "lm loss": report(torch.ones_like(mask)),
            "lm loss original": report(original),
            "lm loss expanded": report(1 - original),
        },
    )


def lpr_token_weight(counts: GlobalCounts, num_microbatches: int, per_token_loss: bool) -> Tensor:
    """What each rank multiplies its sum of LPR terms by so that the gradient is that of the global batch's mean.

    Megatron later divides the gradients of auxiliary losses by micro-batches x data-parallel ranks, or, with
    --calculate-per-token-loss, by the number of loss tokens in the global batch. 0 without original-language tokens.
    """
    divisor = counts.loss_tokens if per_token_loss else num_microbatches * parallel_state.get_data_parallel_world_size()
    return torch.where(counts.original_tokens > 0, divisor / counts.original_tokens.clamp(min=1), 0.0)


def _bits_for_this_stage(batch: Batch, model: torch.nn.Module) -> Tensor | None:
    """Language bits [batch, sequence] (uint8); None for a dense model, whose layers have no router to read them.

    GPTModel splits them along the sequence (sequence parallelism) only on the stage with the embedding; later stages
    must hand over their own share.
    """
    config = get_model_config(model)
    if config.num_moe_experts is None:
        return None
    bits = batch.is_original.to(torch.uint8)
    if config.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        bits = bits.chunk(tp_size, dim=1)[parallel_state.get_tensor_model_parallel_rank()].contiguous()
    return bits
