"""Norms on torch's kernel, for machines without Transformer Engine or Apex and for layers that it does not have."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor of Megatron's norms, for machines without Transformer Engine or Apex.

    Megatron's fallback (WrappedTorchNorm) does not support sequence parallelism, under which the weight's gradient must
    be summed over the tensor-parallel ranks. Megatron sums it for parameters with the attribute `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert config.normalization == "RMSNorm"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        if self.is_zero_centered:
            torch.nn.init.zeros_(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Scale by the weight, or by 1 plus the weight, in fp32 as Transformer Engine and transformers do."""
        if not self.is_zero_centered:
            return super().forward(x)
        weight = 1 + self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps).type_as(x)


class WholeRMSNorm(RMSNorm):
    """The norm of a token's queries or keys over all heads, as in OLMo 2; Megatron's is over each head."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        assert config.tensor_model_parallel_size == 1, "moelpr.plan.layouts rejects it: every rank would need all heads"
        super().__init__(config, heads * hidden_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [sequence, batch, heads, head_dim]."""
        return super().forward(x.flatten(start_dim=2)).view_as(x)
