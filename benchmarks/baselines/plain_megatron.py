"""Plain Megatron MoE: its own MoELayer and SequentialMLP instead of LPRMoELayer, everything else unchanged."""

from functools import partial
from typing import Any
from unittest.mock import patch

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

from moelpr.model import loading
from moelpr.model.builder import block_spec
from moelpr.model_spec import ModelSpec


class PlainMoELayer(MoELayer):
    """Ignores the language bits, which MoELayer would interpret as padding."""

    def forward(self, *args: Any, padding_mask: object = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


_LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
_SEQUENTIAL = partial(SequentialMLP, submodules=_LINEARS)


def plain_block_spec(*args: Any, experts: Any = _SEQUENTIAL, **kwargs: Any) -> Any:
    """moelpr's layers (norms, attention) with Megatron's MoE layer in each, without Transformer Engine."""
    spec = block_spec(*args, **kwargs)
    for layer in spec.layer_specs:
        layer.submodules.mlp = partial(PlainMoELayer, submodules=MoESubmodules(experts=experts))
    return spec


def build(spec: ModelSpec, **settings: object) -> GPTModel:
    """A model of `spec`'s shape with all E experts in the group."""
    assert spec.moe is not None
    with patch.object(loading, "block_spec", plain_block_spec):
        return loading.build_model(spec, num_moe_experts=spec.moe.num_experts, **settings)
