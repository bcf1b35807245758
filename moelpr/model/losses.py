"""The method's losses as pure functions: tensors in, tensor out.

T = tokens, E = experts, of which the first m are the original ones. Every loss is a *sum* over this rank's tokens
divided by a count that the caller takes over whatever it averages on (a rank, a micro-batch, the global batch), so that
cutting a batch differently never changes the result.
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

    -sum_t F(t) log sum_{i<m} G_i(t), with F(t) the language bit, G the softmax over all E experts and m the number of
    original experts. With m = 1 it is that of the paper, section 3.3. It says nothing about which of several original
    experts a token should choose.

    Args:
        logits_TE: router logits, any float type; computed in at least fp32.
        is_original_T: bool, True where the token is original-language text.
        num_original_experts: m, at least 1 and below E.
        num_original_tokens: how many original-language tokens the mean is over; default: those in `is_original_T`.
        variant: `paper` as above; `reference` takes the softmax twice (cross-entropy of already-softmaxed scores), as
            the published code does, which knows m = 1 only. For comparison.

    Returns:
        A scalar; exactly 0 (with zero gradient) where no token is original-language text.
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
    """The smallest value `lpr_loss(..., variant="reference")` can reach, log(1 + (E-m)/(e+m-1)). The paper's: 0."""
    return math.log1p((num_experts - num_original_experts) / (math.e + num_original_experts - 1))


def balance_loss(scores_TE: Tensor, is_chosen_TE: Tensor, topk: int) -> Tensor:
    """Load-balancing loss of one layer over one set of tokens: sum_i f_i P_i.

    f_i = E/(K T) * (tokens that chose expert i), P_i = mean score of expert i (paper section 3.2). Equals 1 under
    perfect balance. Training uses Megatron's implementation of the same sum; this is the definition it is tested
    against.

    Args:
        scores_TE: softmax of the router logits.
        is_chosen_TE: bool, True where expert i is among the token's top-k.
    """
    num_tokens, num_experts = scores_TE.shape
    fraction_E = is_chosen_TE.sum(dim=0) * (num_experts / (topk * num_tokens))
    return (fraction_E * scores_TE.mean(dim=0)).sum()


def megatron_balance_coeff(alpha: float, topk: int, num_moe_layers: int) -> float:
    """The alpha of the paper's experiments as Megatron's `--moe-aux-loss-coeff`.

    The code they were run with sums f over the K slots and averages over layers; Megatron divides by K and adds the
    layers up.
    """
    return alpha * topk / num_moe_layers


def per_layer_lpr_coeff(gamma: float, num_moe_layers: int) -> float:
    """The paper's gamma for one layer: the loss is a mean over layers, and each layer attaches its own share."""
    return gamma / num_moe_layers


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
