"""RMSNorm without Transformer Engine or Apex, also under sequence parallelism.

Megatron's own fallback (WrappedTorchNorm) refuses sequence parallelism, because its weight's gradient must be summed
over the tensor-parallel ranks. Megatron does that for every parameter that carries `sequence_parallel`.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, built the way Megatron builds its norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
