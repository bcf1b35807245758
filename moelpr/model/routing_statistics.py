"""What each router saw in a step, as sums that add up over micro-batches and ranks."""

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingSums(NamedTuple):
    """Sums over tokens, one row per layer; every field [L] but `scores` [L, E]."""

    lpr_loss: Tensor
    original_tokens: Tensor
    expanded_tokens: Tensor
    original_first_choices_of_original: Tensor  # original-language tokens whose first choice is the original expert
    original_first_choices_of_expanded: Tensor
    scores: Tensor

    @classmethod
    def from_vectors(cls, vectors_LV: Tensor) -> "RoutingSums":
        lpr, original, expanded, of_original, of_expanded = vectors_LV[:, :5].unbind(dim=1)
        return cls(lpr, original, expanded, of_original, of_expanded, scores=vectors_LV[:, 5:])


@torch.no_grad()
def routing_vector(logits_TE: Tensor, lpr_sum: Tensor, is_original_T: Tensor, is_text_T: Tensor | None) -> Tensor:
    """The five sums of `RoutingSums` and the summed scores of the E experts as one fp32 vector [5 + E]."""
    is_text_T = torch.ones_like(is_original_T) if is_text_T is None else is_text_T
    original_first_T = logits_TE.argmax(dim=-1) == 0
    is_original_T = is_original_T & is_text_T
    is_expanded_T = ~is_original_T & is_text_T
    counts = torch.stack(
        [
            is_original_T.sum(),
            is_expanded_T.sum(),
            (original_first_T & is_original_T).sum(),
            (original_first_T & is_expanded_T).sum(),
        ]
    )
    scores_E = (torch.softmax(logits_TE.float(), dim=-1) * is_text_T.unsqueeze(-1)).sum(dim=0)
    return torch.cat([lpr_sum.detach().float().reshape(1), counts.float(), scores_E])
