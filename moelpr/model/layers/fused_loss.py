"""The next-token loss and its gradient in one pass over chunks of tokens, so that no logits are kept.

The output layer is frozen or trains in the rows of new tokens only. Forward computes the gradient of its input, which
backward only multiplies by the gradients of the tokens' losses (docs/design/gpu.md).
"""

import math
from functools import partial
from typing import Any

import torch
from megatron.core.jit import jit_fuser
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from moelpr.model.layers.new_rows import rows_that_train
from moelpr.model.stages import CHUNK_LOGITS


def fuse_loss(model_chunks: list[HybridModel], num_real: int) -> None:
    """Have the models compute only losses, without IDs from `num_real` on, which pad the vocabulary."""
    for chunk in model_chunks:
        if chunk.post_process:
            # HybridModel passes the layer's output, with mup's scale, on to the function of the loss.
            chunk.output_layer.forward = lambda hidden_SBH, **_: (hidden_SBH, None)
            chunk.compute_language_model_loss = partial(_losses, chunk, num_real)


def _losses(model: HybridModel, num_real: int, labels_BS: Tensor, hidden_SBH: Tensor) -> Tensor:
    layer, group = model.output_layer, model.output_layer.tp_group
    weight_VH = layer.weight if layer.weight is not None else model.shared_embedding_or_output_weight()
    if layer.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=group)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
    losses: Tensor = _ChunkedLoss.apply(
        hidden_SBH.flatten(0, 1), weight_VH, labels_BS.t().flatten(), num_real, rows_that_train(weight_VH), group
    )
    return losses.view(hidden_SBH.shape[:2]).t().contiguous()


class _ChunkedLoss(torch.autograd.Function):
    """Losses [T] of hidden states [T, H], whose vocabulary is divided over a group of ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        num_real: int,
        rows: slice,
        group: ProcessGroup,
    ) -> Tensor:
        first, trains_rows = group.rank() * len(weight_VH), ctx.needs_input_grad[1]
        targets_T, num_real = targets_T - first, num_real - first
        losses_T = hidden_TH.new_empty(len(hidden_TH), dtype=torch.float32)
        of_hidden_TH = hidden_TH.new_empty(len(hidden_TH), hidden_TH.shape[1] if ctx.needs_input_grad[0] else 0)
        of_rows_TR = hidden_TH.new_empty(len(hidden_TH), len(weight_VH[rows]) if trains_rows else 0)
        size = math.ceil(len(hidden_TH) / math.ceil(len(hidden_TH) * len(weight_VH) / CHUNK_LOGITS))
        chunks = (whole.split(size) for whole in (hidden_TH, targets_T, losses_T, of_hidden_TH, of_rows_TR))
        for hidden, targets, losses, of_hidden, of_rows in zip(*chunks, strict=True):
            logits = hidden @ weight_VH.t()
            largest, total, target_logits = summarize(logits, targets, num_real)
            if group.size() > 1:
                largest_here = largest.clone()
                all_reduce(largest, ReduceOp.MAX, group)
                sums = torch.stack([total * (largest_here - largest).exp(), target_logits])
                all_reduce(sums, group=group)
                total, target_logits = sums
            torch.sub(total.log(), target_logits - largest, out=losses)
            if of_hidden.numel() or of_rows.numel():
                to_gradient(logits, targets, num_real, largest, total)
            if of_hidden.numel():
                torch.mm(logits, weight_VH, out=of_hidden)
            if of_rows.numel():
                of_rows.copy_(logits[:, rows])
            del logits  # or two chunks would be there at once
        ctx.rows = rows
        ctx.save_for_backward(of_hidden_TH, *((of_rows_TR, hidden_TH, weight_VH) if trains_rows else ()))
        return losses_T

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden_TH, *kept = ctx.saved_tensors
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = _scaled(of_hidden_TH, gradient_T)
        if ctx.needs_input_grad[1]:
            of_rows_TR, hidden_TH, weight_VH = kept
            of_weight = torch.zeros_like(weight_VH)
            of_weight[ctx.rows] = _scaled(of_rows_TR, gradient_T).t() @ hidden_TH
        return of_hidden, of_weight, None, None, None, None


def _scaled(rows: Tensor, factor_T: Tensor) -> Tensor:
    """The product in the rows' dtype, computed in fp32 without a copy in it."""
    return torch.mul(rows, factor_T.unsqueeze(1), out=torch.empty_like(rows))


@jit_fuser
def summarize(logits_CV: Tensor, targets_C: Tensor, num_real: int) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32, this rank's largest logit, the sum of exponentials below it, and the target's logit if it is here."""
    vocabulary = logits_CV.shape[1]
    padding_V = torch.arange(vocabulary, device=logits_CV.device) >= num_real
    logits = logits_CV.float().masked_fill(padding_V, torch.finfo(torch.float32).min)
    largest = logits.amax(dim=1)
    total = (logits - largest.unsqueeze(1)).exp().sum(dim=1)
    is_here = (targets_C >= 0) & (targets_C < vocabulary)
    chosen = logits_CV.gather(1, targets_C.where(is_here, 0).unsqueeze(1)).squeeze(1).float()
    return largest, total, chosen.where(is_here, 0.0)


@jit_fuser
def to_gradient(logits_CV: Tensor, targets_C: Tensor, num_real: int, largest_C: Tensor, total_C: Tensor) -> Tensor:
    """Write the losses' gradients over the logits, and return them: the softmax, minus 1 at the target."""
    ids_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    softmax = (logits_CV.float() - largest_C.unsqueeze(1)).exp() / total_C.unsqueeze(1)
    return logits_CV.copy_(softmax.masked_fill(ids_V >= num_real, 0) - (ids_V == targets_C.unsqueeze(1)).float())
