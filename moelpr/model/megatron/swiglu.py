"""Weighted SwiGLU on CPU. Megatron's makes many passes over memory, which only a GPU compiler fuses.

Rows are processed in blocks that stay in the processor's cache; inside a block everything is fp32.
"""

from typing import Any

import torch
from torch import Tensor

_BLOCK_ROWS = 128


class BlockedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight of rows [T, 2f] (gate, then up) and weights [T, 1]; saves its inputs."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        output = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for rows, weight, out in _blocks(gate_up, weights, output):
            gate, up = rows.float().chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate).mul_(up), weight, out=out)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weights = ctx.saved_tensors
        grad_gate_up, grad_weights = torch.empty_like(gate_up), torch.empty_like(weights)
        for rows, weight, grad, grad_rows, grad_weight in _blocks(
            gate_up, weights, grad_output, grad_gate_up, grad_weights
        ):
            gate, up = rows.float().chunk(2, dim=-1)
            grad_gate, grad_up = grad_rows.chunk(2, dim=-1)
            grad_up_of_one = torch.nn.functional.silu(gate).mul_(grad)  # at weight 1
            grad_weight.copy_(torch.linalg.vecdot(grad_up_of_one, up).unsqueeze(-1))
            torch.mul(grad_up_of_one, weight, out=grad_up)
            torch.ops.aten.silu_backward.grad_input((grad * up).mul_(weight), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weights


def weighted_swiglu(gate_up: Tensor, bias: None, weights: Tensor, fp8_input_store: bool = False) -> Tensor:
    """Replaces megatron.core.fusions.fused_bias_swiglu.weighted_bias_swiglu_impl."""
    assert bias is None and not fp8_input_store
    output = BlockedSwiGLU.apply(gate_up.flatten(0, -2), weights.flatten(0, -2))
    return output.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def swiglu(gate_up: Tensor, bias: None, fp8_input_store: bool = False, cpu_offload_input: bool = False) -> Tensor:
    """Replaces bias_swiglu_impl of the same module: three operations under autograd are faster than Megatron's."""
    assert bias is None and not fp8_input_store and not cpu_offload_input
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _blocks(*tensors: Tensor) -> Any:
    return zip(*(tensor.split(_BLOCK_ROWS) for tensor in tensors), strict=True)
