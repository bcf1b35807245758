"""RMSNorm without Transformer Engine or Apex, also under sequence parallelism.

Megatron's fallback (WrappedTorchNorm) does not support sequence parallelism, under which the weight's gradient must be
summed over the tensor-parallel ranks. Megatron sums it for every parameter with the attribute `sequence_parallel`.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor of Megatron's norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
