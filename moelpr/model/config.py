"""Megatron's TransformerConfig plus the MoE-LPR layer's fields, filled from the arguments of the same names."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from moelpr.model.losses import LPRVariant, per_layer_lpr_coeff


@dataclass
class MoELPRConfig(TransformerConfig):
    """`num_moe_experts` is N, the number of *new* experts, because Megatron dispatches them and divides them over EP.

    The router scores E = m + N experts; the original experts are separate modules (docs/design/original-expert.md).
    """

    num_original_experts: int = 1
    """m; more than 1 in a later round of languages, in which the experts of earlier rounds are original experts."""

    lpr_loss_coeff: float = 0.0
    """The paper's gamma; 0 disables the loss."""

    lpr_loss: LPRVariant = "paper"

    train_everything: bool = False
    """The paper's plain-MoE ablation: nothing is frozen, including the original experts."""

    dataloader_inter_document_masking: bool = False
    """Megatron's flag: attention stays within a document (SDPACoreAttention)."""

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts; the others are dense."""
        if self.num_moe_experts is None:
            return 0
        if isinstance(self.moe_layer_freq, int):
            return len(range(0, self.num_layers, self.moe_layer_freq))
        return sum(self.moe_layer_freq)

    @property
    def lpr_coeff_per_layer(self) -> float:
        return per_layer_lpr_coeff(self.lpr_loss_coeff, self.num_moe_layers)
