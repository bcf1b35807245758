"""Megatron's TransformerConfig plus the MoE-LPR layer's fields, filled from the arguments of the same names."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from moelpr.model.losses import LPRVariant


@dataclass
class MoELPRConfig(TransformerConfig):
    """`num_moe_experts` is N, the number of *new* experts, because Megatron dispatches them and divides them over EP.

    The router scores E = P + N places; the original experts are separate modules (docs/design/original-expert.md).
    """

    num_original_experts: int = 1
    """m; more than 1 in a later round of languages, in which the experts of earlier rounds are original experts."""

    original_copies: int = 1
    """C, the router rows of the dense FFN, which a rank holds and computes once."""

    lpr_loss_coeff: float = 0.0
    """The paper's gamma; 0 disables the loss."""

    lpr_loss: LPRVariant = "paper"

    train_everything: bool = False
    """The paper's plain-MoE ablation: nothing is frozen, including the original experts."""

    fuse_expert_gradients: bool = False
    """Transformer Engine adds the gradients of new experts to their fp32 sums in the matrix product itself."""

    dataloader_inter_document_masking: bool = False
    """Megatron's flag: attention stays within a document (SDPACoreAttention)."""

    @property
    def num_original_places(self) -> int:
        """P = C + m - 1, the router's rows of original experts: the first ones."""
        return self.original_copies + self.num_original_experts - 1

    @property
    def is_moe_layer(self) -> list[bool]:
        """For each layer of the model, True if it has experts."""
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return [layer % self.moe_layer_freq == 0 for layer in range(self.num_layers)]
        return [bool(flag) for flag in self.moe_layer_freq]
