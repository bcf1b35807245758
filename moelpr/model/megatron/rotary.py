"""Rotary embeddings without Transformer Engine: Megatron computes cos and sin in every layer, for queries and for keys.

It also copies a tensor whose channels all turn, to join it with none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moelpr.model.megatron.replacing import replaces


def install() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    @replaces(rope_utils, "_apply_rotary_pos_emb_bshd")
    def rotate(
        original: Callable[..., Tensor],
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        if mla_rotary_interleaved or freqs.shape[-1] != t.shape[-1]:
            return original(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale)
        cos, sin = _cos_and_sin(freqs, mscale, t.dtype)
        return t * cos + rope_utils._rotate_half(t, rotary_interleaved) * sin


def _cos_and_sin(freqs: Tensor, mscale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept with the tensor of frequencies, which Megatron keeps for all layers and steps."""
    kept = freqs.__dict__.setdefault("cos_and_sin", {})
    key = mscale, dtype, torch.is_inference_mode_enabled()  # a tensor of inference mode cannot be trained with
    if key not in kept:
        kept[key] = (torch.cos(freqs) * mscale).to(dtype), (torch.sin(freqs) * mscale).to(dtype)
    return kept[key]
