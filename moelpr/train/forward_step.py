"""The forward pass of a micro-batch, called by Megatron's schedule: data, model, next-token loss."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import __straggler__ as stragglers  # does nothing without --log-straggler
from megatron.core.utils import get_model_config
from torch import Tensor

from moelpr.data.batch import Batch, BatchReader, GlobalCounts
from moelpr.model.layers.attention import document_edges
from moelpr.model.megatron import cpu


class ForwardClock:
    """The time that this rank's forward passes take in a step, by events of the GPU, for which nothing waits."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        if cpu.is_needed():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, started: Any) -> None:
        self._spans.append((started, self.mark()))

    def take_s(self) -> float:
        """The seconds since the last call, at the end of a step, whose gradient norm the host has waited for."""
        spans, self._spans = self._spans, []
        if cpu.is_needed() or not spans:
            return float(sum(end - start for start, end in spans))
        spans[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in spans)) / 1000


def forward_step(
    reader: BatchReader, clock: ForwardClock, _: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module
) -> tuple[Tensor, partial]:
    """This pipeline stage's output for the next micro-batch, and the function that makes the last stage's the loss."""
    config = get_model_config(model)
    num_microbatches = get_num_microbatches() if model.training else 1
    with stragglers(bdata=True):
        batch = reader.next(model)
    started = clock.mark()
    config.lpr_token_weight = lpr_token_weight(batch.counts, num_microbatches, config.calculate_per_token_loss)
    with stragglers:
        output = model(
            batch.tokens,
            batch.position_ids,
            # Restricts attention to documents; without it, SDPACoreAttention is causal.
            attention_mask=document_edges(batch.position_ids) if config.dataloader_inter_document_masking else None,
            labels=batch.labels,
            padding_mask=_bits_for_this_stage(batch, model),
        )
    clock.add(started)
    return output, partial(next_token_loss, batch)


def next_token_loss(batch: Batch, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The next-token loss of one micro-batch.

    Args:
        losses_BS: nats per predicted token.

    Returns:
        The sum of the losses; the number of tokens; and the losses to log, as [sum, count] pairs that Megatron adds up
        and divides. Logged are the loss over all tokens and over each language group's; without tokens it is NaN.
    """
    losses, mask, is_original = (tensor.flatten() for tensor in (losses_BS, batch.loss_mask, batch.is_original_label))
    losses = losses.float() * mask
    num_tokens = mask.sum().to(torch.int)

    def report(weight: Tensor) -> Tensor:
        return torch.stack([(losses * weight).sum(), (mask * weight).sum()]).detach()

    original = is_original.float()
    reports = {
        "lm loss": report(torch.ones_like(mask)),
        "lm loss original": report(original),
        "lm loss expanded": report(1 - original),
    }
    return losses.sum(), num_tokens, reports


def lpr_token_weight(counts: GlobalCounts, num_microbatches: int, per_token_loss: bool) -> Tensor:
    """Factor for each rank's sum of LPR terms, so that the gradient is that of the mean over the global batch.

    Megatron later divides the gradients of auxiliary losses by micro-batches x data-parallel ranks or, with
    --calculate-per-token-loss, by the number of loss tokens in the global batch. 0 without original-language tokens.
    """
    divisor = counts.loss_tokens if per_token_loss else num_microbatches * parallel_state.get_data_parallel_world_size()
    return torch.where(counts.original_tokens > 0, divisor / counts.original_tokens.clamp(min=1), 0.0)


def _bits_for_this_stage(batch: Batch, model: torch.nn.Module) -> Tensor | None:
    """Language bits [batch, sequence] (uint8); None for a dense model, which has no routers.

    Under sequence parallelism they are those of this rank's part of the sequence.
    """
    config = get_model_config(model)
    if config.num_moe_experts is None:
        return None
    bits = batch.is_original.to(torch.uint8)
    if config.sequence_parallel:
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        bits = bits.chunk(tp_size, dim=1)[parallel_state.get_tensor_model_parallel_rank()].contiguous()
    return bits
