"""The losses of the method, as pure functions of tensors.

T = tokens, E = experts, of which the first m are the original ones. Every loss is a *sum* over this rank's tokens
divided by a count over whatever the caller averages over (a rank, a micro-batch, the global batch), so that the result
does not depend on how a batch is divided.
"""

import math
from typing import Literal

import torch
from torch import Tensor

LPRVariant = Literal["paper", "reference"]


def lpr_loss(
    logits_TE: Tensor,
    is_original_T: Tensor,
    num_original_experts: int = 1,
    num_original_tokens: Tensor | int | None = None,
    variant: LPRVariant = "paper",
) -> Tensor:
    """Language-priors-routing loss: mean negative log-score of the original experts over original-language tokens.

    -sum_t F(t) log sum_{i<m} G_i(t), where F(t) is the language bit, G the softmax over all E experts, and m the number
    of original experts. With m = 1 it is the loss of the paper, section 3.3. It does not depend on which of several
    original experts a token chooses.

    Args:
        logits_TE: router logits, any float type; computed in at least fp32.
        is_original_T: bool, True where the token is original-language text.
        num_original_experts: m, at least 1 and below E.
        num_original_tokens: number of original-language tokens to average over; default: those in `is_original_T`.
        variant: `paper` is as above; `reference` applies the softmax twice (cross-entropy of already softmaxed scores),
            as the published code does, which supports only m = 1. For comparison.

    Returns:
        A scalar; exactly 0, with zero gradient, if no token is original-language text.
    """
    logits_TE = _at_least_fp32(logits_TE)
    if variant == "reference":
        logits_TE = torch.softmax(logits_TE, dim=-1)
    originals_T = torch.logsumexp(logits_TE[:, :num_original_experts], dim=-1)
    negative_log_score_T = torch.logsumexp(logits_TE, dim=-1) - originals_T
    total = torch.where(is_original_T, negative_log_score_T, 0.0).sum()
    if num_original_tokens is None:
        num_original_tokens = is_original_T.sum()
    return total / torch.as_tensor(num_original_tokens, device=total.device).clamp(min=1)


def reference_lpr_floor(num_experts: int, num_original_experts: int = 1) -> float:
    """The minimum of `lpr_loss(..., variant="reference")`: log(1 + (E-m)/(e+m-1)). That of the paper's loss is 0."""
    return math.log1p((num_experts - num_original_experts) / (math.e + num_original_experts - 1))


def balance_loss(scores_TE: Tensor, is_chosen_TE: Tensor, topk: int) -> Tensor:
    """Load-balancing loss of one layer over one set of tokens: sum_i f_i P_i.

    f_i = E/(K T) * (tokens that chose expert i), P_i = mean score of expert i (paper section 3.2). Equals 1 under
    perfect balance. Training uses Megatron's implementation of the same sum; this definition is for testing it.

    Args:
        scores_TE: softmax of the router logits.
        is_chosen_TE: bool, True where expert i is among the token's top-k.
    """
    num_tokens, num_experts = scores_TE.shape
    fraction_E = is_chosen_TE.sum(dim=0) * (num_experts / (topk * num_tokens))
    return (fraction_E * scores_TE.mean(dim=0)).sum()


def megatron_balance_coeff(alpha: float, topk: int, num_moe_layers: int) -> float:
    """Megatron's `--moe-aux-loss-coeff` for the paper's alpha.

    The paper's code sums f over the K slots and averages over layers; Megatron divides by K and sums over layers.
    """
    return alpha * topk / num_moe_layers


def per_layer_lpr_coeff(gamma: float, num_moe_layers: int) -> float:
    """The paper's gamma divided by the number of layers, because the loss is a mean over layers."""
    return gamma / num_moe_layers


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
