"""Plain Megatron MoE: its own MoELayer and SequentialMLP instead of LPRMoELayer, everything else unchanged."""

from functools import partial
from typing import Any
from unittest.mock import patch

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

from moelpr.model.layers import builder
from moelpr.model.layers.builder import layer_spec
from moelpr.model.layers.loading import build_model
from moelpr.model.model_spec import ModelSpec


class PlainMoELayer(MoELayer):
    """Ignores the language bits, which MoELayer would interpret as padding."""

    def forward(self, *args: Any, padding_mask: object = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


_LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
_SEQUENTIAL = partial(SequentialMLP, submodules=_LINEARS)


def plain_layer_spec(*args: Any, experts: Any = _SEQUENTIAL) -> Any:
    """A layer of moelpr's (norms, attention) with Megatron's MoE layer, without Transformer Engine."""
    spec = layer_spec(*args)
    spec.submodules.mlp = partial(PlainMoELayer, submodules=MoESubmodules(experts=experts))
    return spec


def build(spec: ModelSpec, **settings: object) -> HybridModel:
    """A model of `spec`'s shape with all E experts in the group."""
    assert spec.moe is not None
    with patch.object(builder, "layer_spec", plain_layer_spec):
        return build_model(spec, num_moe_experts=spec.moe.num_experts, **settings)
