"""Megatron's TransformerConfig plus what the MoE-LPR layer needs; filled from the arguments of the same names."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from moelpr.model.losses import LPRVariant, per_layer_lpr_coeff


@dataclass
class MoELPRConfig(TransformerConfig):
    """`num_moe_experts` is N, the number of *new* experts: they are what Megatron dispatches and divides over EP.

    The router scores E = m + N experts; the original experts are modules of their own (docs/design/original-expert.md).
    """

    num_original_experts: int = 1
    """m; more than 1 in a further round of languages, for which the experts of earlier rounds are original ones."""

    lpr_loss_coeff: float = 0.0
    """The paper's gamma; 0 switches the loss off."""

    lpr_loss: LPRVariant = "paper"

    train_everything: bool = False
    """The paper's plain-MoE ablation: nothing is frozen, not even the original experts."""

    dataloader_inter_document_masking: bool = False
    """Megatron's flag: attention stays within a document (SDPACoreAttention)."""

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts; the others were left dense."""
        if self.num_moe_experts is None:
            return 0
        if isinstance(self.moe_layer_freq, int):
            return len(range(0, self.num_layers, self.moe_layer_freq))
        return sum(self.moe_layer_freq)

    @property
    def lpr_coeff_per_layer(self) -> float:
        return per_layer_lpr_coeff(self.lpr_loss_coeff, self.num_moe_layers)
