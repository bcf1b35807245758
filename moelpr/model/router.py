"""LPRRouter: Megatron's top-k router over the original and the new experts, plus the LPR loss."""

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moelpr.metrics.routing_sums import routing_vector
from moelpr.model.config import MoELPRConfig
from moelpr.model.losses import lpr_loss


class LPRLossNormalizer:
    """The weight of an original-language token in the LPR loss, the same for all micro-batches of a global batch.

    The loss is a mean over the original-language tokens of the global batch (tensor-, context- and data-parallel ranks
    and micro-batches), whereas every rank backpropagates a sum over its own tokens. forward_step sets the weight in
    each step so that Megatron's later scaling of gradients results in that mean.
    """

    weight: Tensor | None = None


class LPRRouter(TopKRouter):
    """Routes over E = P + N places; columns 0 to P - 1 are those of the original experts."""

    config: MoELPRConfig

    def __init__(
        self, config: MoELPRConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        router_config = copy.copy(config)
        router_config.num_moe_experts = config.num_original_places + config.num_moe_experts
        super().__init__(config=router_config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.lpr_coeff = config.lpr_loss_coeff / sum(config.is_moe_layer)  # the loss is a mean over layers
        self.routing_sums: Tensor | None = None  # routing_vector summed over the micro-batches of a step

    def forward(self, hidden_SBH: Tensor, language_bits_SB: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route this rank's T = sequence x batch tokens.

        Args:
            hidden_SBH: input of the MoE layer.
            language_bits_SB: 1 for original-language text; None if unknown: no statistics, and an error if the layer
                trains with the LPR loss.

        Returns:
            Gate weights [T, E], 0 for experts that are not chosen, and choices [T, E] (bool).
        """
        assert language_bits_SB is not None or not self.training or self.lpr_coeff == 0, "lost the language bits"
        logits_SBE = self.gating(self.apply_input_jitter(hidden_SBH) if self.training else hidden_SBH)
        gate_weights_TE, is_chosen_TE = self.routing(logits_SBE)
        # Recomputed layers run forward twice, first without gradients; count and attach the loss only once.
        if self.training and torch.is_grad_enabled() and language_bits_SB is not None:
            logits_TE, is_original_T = logits_SBE.flatten(0, 1), language_bits_SB.flatten().bool()
            p, variant = self.config.num_original_places, self.config.lpr_loss
            with torch.set_grad_enabled(self.lpr_coeff > 0):
                lpr_sum = lpr_loss(logits_TE, is_original_T, p, num_original_tokens=1, variant=variant)
            vector = routing_vector(logits_TE, is_chosen_TE, lpr_sum, is_original_T, p)
            self.routing_sums = vector if self.routing_sums is None else self.routing_sums + vector
            if self.lpr_coeff > 0:
                assert LPRLossNormalizer.weight is not None, "forward_step sets the weight before the model runs"
                gate_weights_TE = MoEAuxLossAutoScaler.apply(
                    gate_weights_TE, lpr_sum * self.lpr_coeff * LPRLossNormalizer.weight
                )
        return gate_weights_TE, is_chosen_TE
