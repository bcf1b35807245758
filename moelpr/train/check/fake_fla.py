"""The kernels of linear attention in the package fla, which can't run on tensors without values.

They allocate, keep for the backward pass and touch what fla's (version 0.4) are known to, and compute nothing. This
was not measured: fla needs a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moelpr.model.layers import delta_rule
from moelpr.plan.step_time import linear_attention_flops
from moelpr.train.check.meter import Meter


def install(meter: Meter) -> None:
    """Replace the functions in torch that a machine without fla uses. Call it before the model is built."""

    def l2norm(x: Tensor) -> Tensor:
        return _Kernel.apply(meter, "l2norm", 0, [(x.shape[:-1], torch.float32)], [], x)

    def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, **_: object) -> tuple[Tensor, None]:
        return _Kernel.apply(meter, "causal_conv1d", 0, [], [], x, weight), None

    def chunk_gated_delta_rule(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: object
    ) -> tuple[Tensor, None]:
        batch, length, heads, key_width = key.shape
        value_width, chunk = value.shape[-1], delta_rule.CHUNK
        flops = batch * length * linear_attention_flops(heads, key_width, value_width)
        kept = [(g.shape, torch.float32), ((batch, length, heads, chunk), key.dtype)]  # sums of g, systems of equations
        states = batch, -(-length // chunk), heads, key_width, value_width
        scratch = [(states, key.dtype), (key.shape, key.dtype), (value.shape, key.dtype), (value.shape, key.dtype)]
        # The output is as large as the values, which come first.
        return _Kernel.apply(meter, "chunk_gated_delta_rule", flops, kept, scratch, value, query, key, g, beta), None

    delta_rule.l2norm, delta_rule.causal_conv1d = l2norm, causal_conv1d  # type: ignore[assignment]
    delta_rule.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[assignment]


type _Shapes = Sequence[tuple[Sequence[int], torch.dtype]]


class _Kernel(torch.autograd.Function):
    """A kernel whose output is like its first input.

    It keeps its inputs and `kept`, and allocates `scratch` while it runs; its backward pass makes `scratch` again, with
    the gradient of it.
    """

    @staticmethod
    def forward(
        ctx: Any, meter: Meter, name: str, flops: int, kept: _Shapes, scratch: _Shapes, *inputs: Tensor
    ) -> Tensor:
        made = _empty(kept, inputs[0])
        output = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        meter.note_kernel(name, [*inputs, *made, *_empty(scratch, output), output], flops)
        ctx.save_for_backward(*inputs, *made)
        ctx.call = meter, name, flops, scratch, len(inputs)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        meter, name, flops, scratch, number = ctx.call
        saved = ctx.saved_tensors
        inside = _empty([*scratch, *scratch], gradient)
        gradients = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in saved[:number]]
        # Two products for each one forward, and those that are made again.
        meter.note_kernel(f"{name} backward", [*saved, *inside, gradient, *gradients], 3 * flops)
        return None, None, None, None, None, *gradients


def _empty(shapes: _Shapes, like: Tensor) -> list[Tensor]:
    return [torch.empty(tuple(shape), dtype=dtype, device=like.device) for shape, dtype in shapes]
