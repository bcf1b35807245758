"""Core attention on torch's scaled_dot_product_attention, for machines without Transformer Engine.

Megatron's local attention materializes the score matrix of every head. This one does not, needs no mask tensor, and
does not repeat keys for grouped queries. It can restrict attention to the documents of a packed sequence.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@functools.cache
def _varlen_attention() -> Callable[..., Any] | None:
    """torch's attention within documents on GPUs; None before torch 2.12: no grouped queries, no windows."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, which takes seconds

    is_complete = {"enable_gqa", "scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if is_complete else None


def document_edges(position_BS: Tensor) -> Tensor:
    """The starts of a micro-batch's documents, and its end: int32 [documents + 1], counted along its sequences.

    The positions are those of tokens in their documents; a sequence starts with the rest of a document. On a GPU this
    waits for them, so call it once per micro-batch and not in every layer.
    """
    is_start_BS = position_BS == 0
    is_start_BS[:, 0] = True
    starts = is_start_BS.flatten().nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=position_BS.numel()).to(torch.int32)


class SDPACoreAttention(MegatronModule):
    """Causal self-attention. Dropout and context parallelism, which it lacks, are rejected before it is built."""

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
        """Attend to earlier tokens.

        Args:
            query, key, value: [sequence, batch, heads, head_dim].
            attention_mask: `document_edges` of the micro-batch; tokens attend within documents. None: they attend to
                all earlier tokens. (Megatron passes this argument to every layer.)

        Returns:
            [sequence, batch, heads * head_dim].
        """
        assert packed_seq_params is None and attention_bias is None
        if attention_mask is None and self._limits(len(query)) and self._varlen_attention_for(query) is not None:
            # torch's other attention would need a mask for the window, which few of its kernels support.
            length, batch = query.shape[:2]
            attention_mask = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        if attention_mask is not None:
            return self._within_documents(query, key, value, attention_mask)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return self._causal(query, key, value).permute(2, 0, 1, 3).flatten(start_dim=2)

    def _limits(self, length: int) -> bool:
        """Whether the window is shorter than a sequence of this length."""
        return self.config.window_size is not None and length > self.config.window_size[0] + 1

    @staticmethod
    def _varlen_attention_for(query: Tensor) -> Callable[..., Any] | None:
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        return _varlen_attention() if query.is_cuda and is_half else None

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, sequence, head_dim] in and out."""
        window: Tensor | None = None
        length, size = query.shape[2], self.config.window_size
        if size is not None and self._limits(length):
            # [sequence, sequence], True where a token attends to another
            window = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(-size[0])
        is_grouped = query.shape[1] != key.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, window, is_causal=window is None, scale=self.softmax_scale, enable_gqa=is_grouped
        )

    def _within_documents(self, query: Tensor, key: Tensor, value: Tensor, edges: Tensor) -> Tensor:
        """Rotary positions count from the sequence's start, but attention depends only on their differences."""
        length, batch = query.shape[:2]
        # [batch x sequence, heads, head_dim]
        query, key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        varlen_attention = self._varlen_attention_for(query)
        if varlen_attention is not None:
            window = -1 if self.config.window_size is None else self.config.window_size[0]
            options = {"window_size": (window, 0), "enable_gqa": query.shape[1] != key.shape[1]}
            lengths = edges, edges, length, length
            context = varlen_attention(query, key, value, *lengths, scale=self.softmax_scale, **options)
            assert isinstance(context, Tensor)  # a tuple only with return_aux
        else:
            context = self._document_by_document(query, key, value, edges.diff().tolist())
        return context.unflatten(0, (batch, length)).transpose(0, 1).flatten(start_dim=2)

    def _document_by_document(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """One call per document: less work than one call with a mask, which discards most of the scores."""
        parts = (tensor.split(lengths) for tensor in (query, key, value))  # its gradient is one concatenation
        return torch.cat(
            [
                self._causal(*(part.transpose(0, 1).unsqueeze(0) for part in document)).squeeze(0).transpose(0, 1)
                for document in zip(*parts, strict=True)
            ]
        )
