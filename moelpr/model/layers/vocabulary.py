"""Exclude rows that pad the vocabulary from the softmax.

Megatron pads the embedding and the output layer to a multiple of the tensor-parallel size. If they train, the model
soon learns that padding never comes next. Here they are frozen at zero, and a logit of 0 is not small: without the
mask, the loss would depend on the number of rows, and so on the layout.
"""

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


def mask_padding(model_chunks: list[HybridModel], vocab_size: int) -> list[HybridModel]:
    """Set the logits of IDs >= `vocab_size` to the smallest finite value; returns the same chunks."""
    for chunk in model_chunks:
        if chunk.post_process:
            _mask_padding_of(chunk.output_layer, vocab_size)
    return model_chunks


def _mask_padding_of(output_layer: ColumnParallelLinear, vocab_size: int) -> None:
    num_rows = output_layer.output_size_per_partition  # rows of this tensor-parallel rank
    num_real = min(max(vocab_size - output_layer.tp_group.rank() * num_rows, 0), num_rows)
    if num_real == num_rows:
        return

    def mask(module: torch.nn.Module, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        logits_SBV = output[0]
        assert logits_SBV.shape[-1] == num_rows, "gathered logits are for inference"
        logits_SBV[..., num_real:] = torch.finfo(logits_SBV.dtype).min

    output_layer.register_forward_hook(mask)
