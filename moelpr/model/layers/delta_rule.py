"""The gated delta rule in torch, for machines without the kernels of the package fla (flash-linear-attention).

Megatron's GatedDeltaNet takes three functions of fla, which has them for GPUs only. These have the same arguments and
results. With `cu_seqlens`, the edges of documents in a batch of one, neither states nor convolutions cross documents.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens that are computed at once; a multiple of the cost of a token grows with it, the number of steps falls.
CHUNK = 64


def install() -> None:
    """Give Megatron these functions if there is no fla, or no GPU for it."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    if common.HAVE_FLA and torch.cuda.is_available():
        return
    common.HAVE_FLA, common.l2norm = True, l2norm
    gdn.causal_conv1d, gdn.chunk_gated_delta_rule = causal_conv1d, chunk_gated_delta_rule


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors of length 1, computed in fp32."""
    return (x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, cu_seqlens: Tensor | None = None, **_: object
) -> tuple[Tensor, None]:
    """SiLU of a convolution of each channel with its last tokens: x is [batch, sequence, channels]."""
    assert activation in ("silu", "swish")

    def convolved(x_BSC: Tensor) -> Tensor:
        padded_BCS = F.pad(x_BSC.transpose(1, 2), (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(padded_BCS, weight.unsqueeze(1), bias, groups=len(weight))).transpose(1, 2)

    return _by_document(convolved, cu_seqlens, x), None


def chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **_: object
) -> tuple[Tensor, None]:
    """The values that a state has for each query, where each token first decays it and then replaces a value in it.

    S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - k_t exp(g_t) S_(t-1)))ᵀ, and the output is q_t S_t / sqrt(head).

    Args:
        query, key: [batch, sequence, heads, key head].
        value: [batch, sequence, heads, value head].
        g: the logarithm of the decay, at most 0: [batch, sequence, heads].
        beta: [batch, sequence, heads].
    """
    return _by_document(_delta_rule, cu_seqlens, query, key, value, g, beta), None


def _by_document(function: Callable[..., Tensor], edges: Tensor | None, *tensors: Tensor) -> Tensor:
    if edges is None:
        return function(*tensors)
    parts = (tensor.split(edges.diff().tolist(), dim=1) for tensor in tensors)
    return torch.cat([function(*document) for document in zip(*parts, strict=True)], dim=1)


def _delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """In fp32, chunk by chunk: N chunks of C tokens; K and V are the widths of a key and of a value.

    Within a chunk, what the tokens write depends on what the earlier ones wrote: a triangular system of equations.
    """
    dtype, length = query.dtype, query.shape[1]
    chunk = min(CHUNK, length)
    q_BHNCK, k_BHNCK, v_BHNCV = (_chunks(x.flatten(3), chunk) for x in (query, key, value))
    g_BHNC, beta_BHNC1 = _chunks(g.unsqueeze(-1), chunk).squeeze(-1).cumsum(-1), _chunks(beta.unsqueeze(-1), chunk)
    q_BHNCK = q_BHNCK * query.shape[-1] ** -0.5
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=g.device).triu(1)
    # The decay between two tokens of a chunk. Masked before exp, where differences of later tokens would overflow.
    decay_BHNCC = _exp((g_BHNC.unsqueeze(-1) - g_BHNC.unsqueeze(-2)).masked_fill(later, -torch.inf))
    kept_BHNC1 = _exp(g_BHNC).unsqueeze(-1)

    written_BHNCK = k_BHNCK * beta_BHNC1
    system_BHNCC = written_BHNCK @ k_BHNCK.transpose(-1, -2) * decay_BHNCC
    right = torch.cat([v_BHNCV * beta_BHNC1, written_BHNCK * kept_BHNC1], dim=-1)
    solved = torch.linalg.solve_triangular(system_BHNCC, right, upper=False, unitriangular=True)
    values, keys = (part.unbind(2) for part in solved.split([value.shape[-1], key.shape[-1]], dim=-1))
    within = (q_BHNCK @ k_BHNCK.transpose(-1, -2) * decay_BHNCC).unbind(2)
    reads = (q_BHNCK * kept_BHNC1).unbind(2)
    writes = (k_BHNCK * _exp(g_BHNC[..., -1:] - g_BHNC).unsqueeze(-1)).transpose(-1, -2).unbind(2)
    state_BHKV = v_BHNCV.new_zeros(*q_BHNCK.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for i, decay_BH11 in enumerate(kept_BHNC1[..., -1:, :].unbind(2)):
        new_BHCV = values[i] - keys[i] @ state_BHKV
        outputs.append(reads[i] @ state_BHKV + within[i] @ new_BHCV)
        state_BHKV = state_BHKV * decay_BH11 + writes[i] @ new_BHCV
    return torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2).to(dtype)


def _exp(log: Tensor) -> Tensor:
    """The exponential, 0 below 1e-34: numbers that fp32 can only hold denormalized make products four times as slow."""
    return F.threshold(log, -78.0, -torch.inf).exp()


def _chunks(x_BSHD: Tensor, size: int) -> Tensor:
    """[batch, heads, chunks, size, D] in fp32; tokens that fill the last chunk are 0, and write and decay nothing."""
    # Contiguous, or each product would copy it.
    x_BHSD = x_BSHD.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if missing := -x_BHSD.shape[2] % size:
        x_BHSD = F.pad(x_BHSD, (0, 0, 0, missing))
    return x_BHSD.unflatten(2, (-1, size))
