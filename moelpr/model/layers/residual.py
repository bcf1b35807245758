"""Additions to the residual of layers that scale or normalize the outputs of attention and FFN."""

from collections.abc import Callable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor, nn

from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.layers.norms import RMSNorm

# (output, bias), residual, dropout → the new residual.
AddResidual = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def add_changed(change: Callable[[Tensor], Tensor]) -> Callable[[bool, bool], AddResidual]:
    """Megatron's `get_bias_dropout_add` for layers that change their outputs before they are added."""

    def get_add(training: bool, fused: bool) -> AddResidual:
        add = get_bias_dropout_add(training, fused)

        def add_to(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            assert bias is None, "the linear layers of every family have none"
            return add((change(output), None), residual, dropout)

        return add_to

    return get_add


class NormedAdd(nn.Module):
    """`add_changed` for layers that normalize their outputs, not their inputs, as OLMo 2's do."""

    def __init__(self, config: MoELPRConfig) -> None:
        super().__init__()
        self.layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> AddResidual:
        """The function that adds an output."""
        return add_changed(self.layernorm)(training, fused)
