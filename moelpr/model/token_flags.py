"""The per-token flags that ride from the batch to every router in Megatron's `padding_mask` argument.

`padding_mask` is the one per-token tensor that Megatron hands from the model through block, layer and recompute to the
MoE layer, so the language bit travels there, as a bit of a small integer beside the real padding bit.
"""

import torch
from torch import Tensor

_PADDING = 1
_ORIGINAL = 2


def pack_token_flags(is_original: Tensor, is_padding: Tensor | None = None) -> Tensor:
    """uint8 flags of the shape of `is_original` (bool); `is_padding` (bool) marks tokens that are not text."""
    flags = is_original.to(torch.uint8) * _ORIGINAL
    if is_padding is not None:
        flags = flags | is_padding.to(torch.uint8) * _PADDING
    return flags


def unpack_token_flags(flags: Tensor) -> tuple[Tensor, Tensor | None]:
    """(is_original, is_padding), both bool; a bool `flags` is Megatron's own padding mask, without language bits."""
    if flags.dtype == torch.bool:
        return torch.zeros_like(flags), flags
    is_padding = (flags & _PADDING).bool()
    return (flags & _ORIGINAL).bool(), is_padding
