"""Routing statistics of a step, as sums that can be added over micro-batches and ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

# Fields of RoutingSums that are one number per layer.
NUM_COUNTS = 7


class RoutingSums(NamedTuple):
    """Sums over tokens, one row per layer: every field is [L], except `scores` and `choices`, which are [L, E]."""

    lpr_loss: Tensor
    original_tokens: Tensor
    expanded_tokens: Tensor
    original_first_choices_of_original: Tensor  # original-language tokens whose first choice is an original expert
    original_first_choices_of_expanded: Tensor
    all_original_of_original: Tensor  # original-language tokens whose K choices are all original experts
    all_original_of_expanded: Tensor
    scores: Tensor
    choices: Tensor  # tokens that have the expert among their K chosen ones

    @classmethod
    def from_vectors(cls, vectors_LV: Tensor) -> "RoutingSums":
        return cls(*vectors_LV[:, :NUM_COUNTS].unbind(dim=1), *vectors_LV[:, NUM_COUNTS:].chunk(2, dim=1))

    @staticmethod
    def vector_size(num_experts: int) -> int:
        return NUM_COUNTS + 2 * num_experts

    # Means over tokens, NaN without tokens.

    def mean_lpr_loss(self) -> Tensor:
        """Mean over layers and original-language tokens (scalar)."""
        return (self.lpr_loss / self.original_tokens).mean()

    def mean_scores(self) -> Tensor:
        """Mean router score of each expert [L, E]."""
        return self.scores / (self.original_tokens + self.expanded_tokens).unsqueeze(1)

    def token_shares(self) -> Tensor:
        """Fraction of the tokens that chose each expert [L, E]; sums to K in each layer."""
        return self.choices / (self.original_tokens + self.expanded_tokens).unsqueeze(1)

    def original_first_share_of_original(self) -> Tensor:
        """Fraction of original-language tokens whose first choice is an original expert [L]."""
        return self.original_first_choices_of_original / self.original_tokens

    def original_first_share_of_expanded(self) -> Tensor:
        """Fraction of expanded-language tokens whose first choice is an original expert [L]."""
        return self.original_first_choices_of_expanded / self.expanded_tokens

    def all_original_share_of_original(self) -> Tensor:
        """Fraction of original-language tokens whose choices are all original experts [L]."""
        return self.all_original_of_original / self.original_tokens

    def all_original_share_of_expanded(self) -> Tensor:
        """Fraction of expanded-language tokens whose choices are all original experts [L]."""
        return self.all_original_of_expanded / self.expanded_tokens

    def log_line(self) -> str:
        """Means over layers in the format of Megatron's log; values without tokens are omitted."""
        values = {
            "lpr loss": self.mean_lpr_loss(),
            "original expert first, original tokens": self.original_first_share_of_original().mean(),
            "original expert first, expanded tokens": self.original_first_share_of_expanded().mean(),
        }
        fields = [f" {name}: {value:.4f} |" for name, value in values.items() if not value.isnan()]
        scores = " ".join(f"{score:.3f}" for score in self.mean_scores().mean(dim=0).tolist())
        return "".join(fields) + f" mean router scores: {scores} |"


@torch.no_grad()
def routing_vector(
    logits_TE: Tensor, is_chosen_TE: Tensor, lpr_sum: Tensor, is_original_T: Tensor, num_original_places: int
) -> Tensor:
    """`RoutingSums` of one layer as one fp32 vector [NUM_COUNTS + 2 E]."""
    original_first_T = logits_TE.argmax(dim=-1) < num_original_places
    all_original_T = ~is_chosen_TE[:, num_original_places:].any(dim=-1)
    masks = [
        mask_T & group_T
        for mask_T in (torch.ones_like(is_original_T), original_first_T, all_original_T)
        for group_T in (is_original_T, ~is_original_T)
    ]
    counts = torch.stack([mask_T.sum() for mask_T in masks])
    scores_E = torch.softmax(logits_TE.float(), dim=-1).sum(dim=0)
    choices_E = is_chosen_TE.sum(dim=0)
    return torch.cat([lpr_sum.detach().float().reshape(1), counts.float(), scores_E, choices_E.float()])
