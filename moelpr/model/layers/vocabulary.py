"""Exclude rows that pad the vocabulary from the softmax.

Megatron pads the embedding and the output layer to a multiple of the tensor-parallel size. If they train, the model
soon learns that padding never comes next. Here they are frozen at zero, and a logit of 0 is not small: without the
mask, the loss would depend on the number of rows, and so on the layout.
"""

from functools import partial

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


def mask_padding(model_chunks: list[HybridModel], vocab_size: int) -> None:
    """Set the logits of IDs >= `vocab_size` to the smallest finite value."""
    for layer in (chunk.output_layer for chunk in model_chunks if chunk.post_process):
        num_rows = layer.output_size_per_partition  # rows of this tensor-parallel rank
        num_real = min(max(vocab_size - layer.tp_group.rank() * num_rows, 0), num_rows)
        if num_real < num_rows:
            layer.register_forward_hook(partial(_mask_from, num_real))


def _mask_from(num_real: int, layer: ColumnParallelLinear, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
    logits_SBV = output[0]
    assert logits_SBV.shape[-1] == layer.output_size_per_partition, "gathered logits are for inference"
    logits_SBV[..., num_real:] = torch.finfo(logits_SBV.dtype).min
