"""LPRRouter: Megatron's top-k router over the original and the new experts, plus the LPR loss."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.layers.losses import lpr_loss
from moelpr.model.metrics.routing_sums import routing_vectors


class Decisions:
    """The decisions of a rank's routers in a micro-batch, summed for all of them at once.

    On a GPU the sums of one router are about 35 tiny kernels, during which its layer waits.
    """

    def __init__(self, num_routers: int) -> None:
        self.num_routers = num_routers
        self._kept: list[tuple[LPRRouter, Tensor, Tensor, Tensor]] = []

    def keep(self, router: "LPRRouter", logits_SBE: Tensor, is_chosen_TE: Tensor, language_bits_SB: Tensor) -> None:
        """Keep a router's decisions until those of all routers are there, or this router's of another micro-batch."""
        if any(router is other for other, *_ in self._kept):
            self.add_up()
        self._kept.append((router, logits_SBE, is_chosen_TE, language_bits_SB))
        if len(self._kept) == self.num_routers:
            self.add_up()

    @torch.no_grad()
    def add_up(self) -> None:
        """Add what is kept to the routers' `routing_sums`."""
        if not self._kept:
            return
        routers, *tensors = zip(*self._kept, strict=True)
        self._kept = []
        logits, is_chosen_LTE, bits = (torch.stack(of_routers) for of_routers in tensors)
        logits_LTE, is_original_LT = logits.flatten(1, 2), bits.flatten(1).bool()
        p, variant = routers[0].config.num_original_places, routers[0].config.lpr_loss
        lpr_sum_L = lpr_loss(logits_LTE, is_original_LT, p, variant)
        routed_LTE = routers[0].masked(logits_LTE)
        vectors = routing_vectors(routed_LTE, is_chosen_LTE, lpr_sum_L, is_original_LT, p).unbind()
        sums = [router.routing_sums for router in routers]
        if any(tensor is None for tensor in sums):  # the first micro-batch of a step
            added: Sequence[Tensor] = [
                new if old is None else old + new for old, new in zip(sums, vectors, strict=True)
            ]
        else:
            added = torch._foreach_add(sums, vectors)
        for router, tensor in zip(routers, added, strict=True):
            router.routing_sums = tensor


class LPRRouter(TopKRouter):
    """Routes over E = P + N places; columns 0 to P - 1 are those of the original experts."""

    config: MoELPRConfig

    def __init__(
        self, config: MoELPRConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        router_config = copy.copy(config)
        router_config.num_moe_experts = config.num_original_places + config.num_moe_experts
        super().__init__(config=router_config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.model_config = config
        self.lpr_coeff = config.lpr_loss_coeff / sum(config.is_moe_layer)  # the loss is a mean over layers
        self.routing_sums: Tensor | None = None  # routing_vectors summed over the micro-batches of a step
        self.decisions = Decisions(num_routers=1)

    def masked(self, logits: Tensor) -> Tensor:
        """The logits [..., E] that tokens are routed by in training: those of places that are left out are lowest.

        The lowest finite number: Infinity would give NaN in the router's z-loss and in fused kernels.
        """
        if self.config.stage1_experts == "all":
            return logits
        is_original_E = torch.arange(self.num_experts, device=logits.device) < self.config.num_original_places
        return logits.masked_fill(is_original_E, torch.finfo(logits.dtype).min)

    def _apply_aux_loss(self, probs: Tensor, scores_for_aux_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's balance loss, over the experts that tokens can choose: 1 where they are chosen equally often."""
        if self.config.stage1_experts == "new":
            scores_for_aux_loss = scores_for_aux_loss * (1 - self.config.num_original_places / self.num_experts)
        return super()._apply_aux_loss(probs, scores_for_aux_loss, *args, **kwargs)

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
        gate_weights_TE, is_chosen_TE = self.routing(self.masked(logits_SBE) if self.training else logits_SBE)
        # Recomputed layers run forward twice, first without gradients; count and attach the loss only once.
        if self.training and torch.is_grad_enabled() and language_bits_SB is not None:
            self.decisions.keep(self, logits_SBE.detach(), is_chosen_TE, language_bits_SB)
            if self.lpr_coeff > 0:
                weight = self.model_config.lpr_token_weight
                assert weight is not None, "forward_step sets the weight before the model runs"
                logits_TE, is_original_T = logits_SBE.flatten(0, 1), language_bits_SB.flatten().bool()
                p, variant = self.config.num_original_places, self.config.lpr_loss
                lpr_sum = lpr_loss(logits_TE, is_original_T, p, variant)
                gate_weights_TE = MoEAuxLossAutoScaler.apply(gate_weights_TE, lpr_sum * self.lpr_coeff * weight)
        return gate_weights_TE, is_chosen_TE
