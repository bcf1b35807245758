"""Core attention on torch's scaled_dot_product_attention, for machines without Transformer Engine.

Megatron's local attention materialises the score matrix of every head; this one does not, needs no mask tensor and
does not repeat keys for grouped queries.
"""

import math

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SDPACoreAttention(MegatronModule):
    """Causal attention; what it lacks (dropout, context parallelism) is refused before it is built."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1 and not config.attention_dropout
        assert config.window_attn_skip_freq is None, "all layers have the same window"
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """[sequence, batch, heads, head_dim] in, [sequence, batch, heads * head_dim] out. The mask is always causal."""
        assert packed_seq_params is None and attention_bias is None
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        window = self._window(query)
        context = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=window,
            is_causal=window is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _window(self, query: Tensor) -> Tensor | None:
        """[sequence, sequence], True where a token looks back at another; None where the window holds all before it."""
        length = query.shape[2]
        if self.config.window_size is None or length <= self.config.window_size[0] + 1:
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        return causal.triu(-self.config.window_size[0])
