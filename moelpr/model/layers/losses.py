"""The losses of the method, as pure functions of tensors."""

from typing import Literal

import torch
from torch import Tensor

LPRVariant = Literal["paper", "reference"]


def lpr_loss(
    logits: Tensor, is_original: Tensor, num_original_places: int = 1, variant: LPRVariant = "paper"
) -> Tensor:
    """Language-priors-routing loss: the sum of the negative log-scores of the original experts.

    -sum_t F(t) log sum_{i<P} G_i(t), where F(t) is the language bit, G the softmax over all E places, and P the number
    of original ones. With P = 1, the mean over original-language tokens is the loss of the paper, section 3.3; the
    caller divides by their number in the global batch, so the result does not depend on how a batch is divided. The
    loss does not depend on which of several original places a token chooses.

    Args:
        logits: router logits [..., T, E], any float type; computed in at least fp32.
        is_original: bool [..., T], True where the token is original-language text.
        num_original_places: P, at least 1 and below E.
        variant: `paper` is as above; `reference` applies the softmax twice (cross-entropy of already softmaxed scores),
            as the published code does for P = 1, all that it supports. For comparison.

    Returns:
        Sums [...]; exactly 0, with zero gradient, if no token is original-language text.
    """
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
