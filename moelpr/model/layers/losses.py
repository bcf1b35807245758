"""The losses of the method, as pure functions of tensors.

T = tokens, E = places of experts, of which the first P are original. Every loss is a *sum* over this rank's tokens
divided by a token count that the caller chooses (of the rank, the micro-batch or the global batch), so that the result
does not depend on how a batch is divided.
"""

from typing import Literal

import torch
from torch import Tensor

LPRVariant = Literal["paper", "reference"]


def lpr_loss(
    logits_TE: Tensor,
    is_original_T: Tensor,
    num_original_places: int = 1,
    num_original_tokens: Tensor | int | None = None,
    variant: LPRVariant = "paper",
) -> Tensor:
    """Language-priors-routing loss: mean negative log-score of the original experts over original-language tokens.

    -sum_t F(t) log sum_{i<P} G_i(t), where F(t) is the language bit, G the softmax over all E places, and P the number
    of original ones. With P = 1 it is the loss of the paper, section 3.3. It does not depend on which of several
    original places a token chooses.

    Args:
        logits_TE: router logits, any float type; computed in at least fp32.
        is_original_T: bool, True where the token is original-language text.
        num_original_places: P, at least 1 and below E.
        num_original_tokens: number of original-language tokens to average over; default: those in `is_original_T`.
        variant: `paper` is as above; `reference` applies the softmax twice (cross-entropy of already softmaxed scores),
            as the published code does for P = 1, all that it supports. For comparison.

    Returns:
        A scalar; exactly 0, with zero gradient, if no token is original-language text.
    """
    total = lpr_sums(logits_TE, is_original_T, num_original_places, variant)
    if isinstance(num_original_tokens, int):
        return total / max(1, num_original_tokens)  # as a tensor it would have to wait for the GPU
    if num_original_tokens is None:
        num_original_tokens = is_original_T.sum()
    return total / num_original_tokens.clamp(min=1)


def lpr_sums(logits: Tensor, is_original: Tensor, num_original_places: int, variant: LPRVariant) -> Tensor:
    """The sum of -F(t) log sum_{i<P} G_i(t) over the tokens, for logits [..., T, E] and bits [..., T]."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    if variant == "reference":
        logits = torch.softmax(logits, dim=-1)
    negative_log_score = torch.logsumexp(logits, dim=-1) - torch.logsumexp(logits[..., :num_original_places], dim=-1)
    return torch.where(is_original, negative_log_score, 0.0).sum(dim=-1)


def megatron_balance_coeff(alpha: float, topk: int, num_moe_layers: int) -> float:
    """Megatron's `--moe-aux-loss-coeff` for the paper's alpha.

    The paper's code sums f over the K slots and averages over layers; Megatron divides by K and sums over layers.
    """
    return alpha * topk / num_moe_layers
