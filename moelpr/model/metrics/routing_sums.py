"""The decisions of a layer's router, summed over tokens: in training per step, in an evaluation per language.

T = tokens, E = experts (places of the router), of which the first P are original, L = MoE layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def is_all_original(is_chosen: Tensor, num_original_places: int) -> Tensor:
    """Whether all of a token's choices [..., E] are original experts [...]."""
    return ~is_chosen[..., num_original_places:].any(dim=-1)


class RoutingSums(NamedTuple):
    """Sums over the tokens of a training step; the second axis of a pair is (original, expanded) language."""

    lpr_loss: Tensor  # [L]
    tokens: Tensor  # [L, 2]
    original_first: Tensor  # tokens whose first choice is an original expert [L, 2]
    all_original: Tensor  # tokens whose choices are all original experts [L, 2]
    scores: Tensor  # router scores [L, E]
    choices: Tensor  # tokens that choose the expert [L, E]

    @classmethod
    def from_vectors(cls, vectors_LV: Tensor) -> "RoutingSums":
        """Read vectors of `routing_vectors`, one per layer, summed over micro-batches and ranks."""
        num_experts = (vectors_LV.shape[1] - 7) // 2
        lpr_loss, *others = vectors_LV.split([1, 2, 2, 2, num_experts, num_experts], dim=1)
        return cls(lpr_loss.squeeze(1), *others)

    @staticmethod
    def vector_size(num_experts: int) -> int:
        return 7 + 2 * num_experts

    # Means over tokens, NaN without tokens.

    def mean_lpr_loss(self) -> Tensor:
        """The mean over layers and original-language tokens (scalar)."""
        return (self.lpr_loss / self.tokens[:, 0]).mean()

    def router_scores(self) -> Tensor:
        """The mean router score of each expert [L, E]."""
        return self.scores / self.tokens.sum(dim=1, keepdim=True)

    def token_shares(self) -> Tensor:
        """The fraction of tokens that choose each expert [L, E]; sums to K in each layer."""
        return self.choices / self.tokens.sum(dim=1, keepdim=True)

    def original_first_share(self) -> Tensor:
        """The fraction of tokens whose first choice is an original expert [L, 2]."""
        return self.original_first / self.tokens

    def all_original_share(self) -> Tensor:
        """The fraction of tokens whose choices are all original experts [L, 2]."""
        return self.all_original / self.tokens


@torch.no_grad()
def routing_vectors(
    logits_LTE: Tensor, is_chosen_LTE: Tensor, lpr_sum_L: Tensor, is_original_LT: Tensor, num_original_places: int
) -> Tensor:
    """The `RoutingSums` of layers in one micro-batch, as one fp32 vector per layer."""
    is_original_first_LT = logits_LTE.argmax(dim=-1) < num_original_places
    is_all_original_LT = is_all_original(is_chosen_LTE, num_original_places)
    masks_LT3 = torch.stack([torch.ones_like(is_original_LT), is_original_first_LT, is_all_original_LT], dim=-1)
    groups_LT2 = torch.stack([is_original_LT, ~is_original_LT], dim=-1)
    counts_L6 = (masks_LT3.unsqueeze(-1) & groups_LT2.unsqueeze(-2)).sum(dim=1).flatten(1)
    scores_LE = torch.softmax(logits_LTE.float(), dim=-1).sum(dim=1)
    choices_LE = is_chosen_LTE.sum(dim=1)
    return torch.cat([lpr_sum_L.float().unsqueeze(1), counts_L6.float(), scores_LE, choices_LE.float()], dim=1)


def text_vector(logits_TE: Tensor, topk: int, num_original_places: int, weight_T: Tensor) -> Tensor:
    """Sums of one layer and batch over the counted tokens of a text as one fp64 vector [3 E + 4].

    It has first choices, choices and scores [E each], the entropy of the scores, the tokens with any and with all
    choices among the original experts, and the gate weights of new experts. `weight_T` is 1 for counted tokens, else 0.
    """
    log_scores_TE = logits_TE.log_softmax(dim=-1)
    scores_TE = log_scores_TE.exp()
    chosen_logits_TK, choices_TK = logits_TE.topk(topk, dim=-1)
    is_first_TE = torch.zeros_like(scores_TE).scatter_(1, choices_TK[:, :1], 1.0)
    is_chosen_TE = torch.zeros_like(scores_TE).scatter_(1, choices_TK, 1.0)
    entropy_T = -(scores_TE * log_scores_TE).sum(dim=-1)
    has_original_T = is_chosen_TE[:, :num_original_places].amax(dim=-1)
    all_original_T = is_all_original(is_chosen_TE.bool(), num_original_places).float()
    new_weight_T = (chosen_logits_TK.softmax(dim=-1) * (choices_TK >= num_original_places)).sum(dim=-1)
    others_T4 = torch.stack([entropy_T, has_original_T, all_original_T, new_weight_T], dim=-1)
    columns = torch.cat([is_first_TE, is_chosen_TE, scores_TE, others_T4], dim=-1)
    # A layer may be on another GPU. A batch's counts are exact in float32.
    return (weight_T.to(columns.device) @ columns).double()
