"""Our models on Megatron's HybridModel: blocks of Megatron's dense layers, and blocks with an LPRMoELayer.

What HybridModel lacks and how it is mended: docs/design/megatron-trainer.md.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from torch import Tensor

from moelpr.model.layers.attention import SDPACoreAttention
from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.layers.experts import GroupedExperts
from moelpr.model.layers.gated_delta_net import GatedDeltaNet
from moelpr.model.layers.layer import LPRMoELayer
from moelpr.model.layers.norms import RMSNorm, WholeRMSNorm
from moelpr.model.layers.residual import NormedAdd, add_changed
from moelpr.model.layers.router import LPRRouter
from moelpr.model.megatron.replacing import replaces

_NO_STATE = "output_layer._extra_state"


@dataclass(kw_only=True)
class MoELPRModelConfig(HybridModelConfig):
    """Megatron's description of a model, with the scaling of Llama 3's rotary embedding."""

    builder: ClassVar[str] = "moelpr.model.layers.builder.MoELPRModelBuilder"
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0


class MoELPRModelBuilder(HybridModelBuilder):
    """Builds a stage of the pipeline, with what Megatron's GPTModel has and HybridModel lacks."""

    _model_config: MoELPRModelConfig

    def build_model(self, *args: Any, **kwargs: Any) -> HybridModel:
        model_config, config = self._model_config, self._model_config.transformer
        model_config.hybrid_layer_pattern = layer_pattern(config)
        layers = HybridStackSubmodules(attention_layer=DecoderLayer)
        model_config.hybrid_stack_spec = ModuleSpec(module=DecoderStack, submodules=layers)
        model = super().build_model(*args, **kwargs)
        model.rotary_pos_emb.rotary_interleaved = config.rotary_interleaved
        if model_config.rope_scaling:
            unscaled = model.rotary_pos_emb.inv_freq
            model.rotary_pos_emb.inv_freq = model.rotary_pos_emb._apply_scaling(
                unscaled, model_config.rope_scaling_factor
            )

        @replaces(model, "sharded_state_dict")
        def saved(full_state: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
            """Without a state of the output layer, which is always empty."""
            return {key: part for key, part in full_state(*args, **kwargs).items() if not key.endswith(_NO_STATE)}

        return model


class DecoderStack(HybridStack):
    """The layers of a stage. Names, and so the keys in checkpoints, are those of Megatron's TransformerBlock."""

    def __init__(self, config: MoELPRConfig, **kwargs: Any) -> None:
        super().__init__(config, post_layer_norm=False, **kwargs)  # its norm is Transformer Engine's
        self.post_layer_norm = True
        if self.post_process:
            norm = _norm(config.transformer_impl == "transformer_engine")
            self.final_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    @property
    def final_norm(self) -> Any:
        """HybridStack's name of the last norm."""
        return self.final_layernorm

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states after these layers; with dropout that differs between parts of a sequence."""
        with get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            return super().forward(*args, **kwargs)


class DecoderLayer(TransformerLayer):
    """A whole block, attention and FFN, of the kind that the model has at its place."""

    def __init__(self, config: MoELPRConfig, layer_number: int, pp_layer_offset: int, **kwargs: Any) -> None:
        # `pp_layer_offset` is for caches in inference, and linear attention does not take it.
        super().__init__(config, layer_spec(config, layer_number - 1).submodules, layer_number, **kwargs)


def layer_pattern(config: MoELPRConfig) -> str:
    """HybridModel's pattern: a `*` for each layer, and `|` between stages, in the order of their layers."""
    chunks = range(config.virtual_pipeline_model_parallel_size or 0) or [None]
    ranks = range(config.pipeline_model_parallel_size)
    return "|".join("*" * get_num_layers_to_build(config, chunk, rank) for chunk in chunks for rank in ranks)


def layer_spec(config: MoELPRConfig, layer: int) -> ModuleSpec:
    """The parts of a layer, counted from 0."""
    make = _moe_layer if config.is_moe_layer[layer] else _dense_layer
    return make(config, config.transformer_impl == "transformer_engine", config.is_linear_layer[layer])


def _dense_layer(config: MoELPRConfig, use_te: bool, is_linear: bool) -> ModuleSpec:
    spec = _full_attention_layer(config, use_te)
    if config.residual_multiplier != 1.0:
        scaled = add_changed(lambda output: output * config.residual_multiplier)
        spec.submodules.self_attn_bda = spec.submodules.mlp_bda = scaled
    if config.norms_after:
        _move_norms(spec, config)
    if is_linear:
        attention = spec.submodules.self_attention.submodules
        projections = GatedDeltaNetSubmodules(attention.linear_qkv, _norm(use_te), attention.linear_proj)
        spec.submodules.self_attention = ModuleSpec(module=GatedDeltaNet, submodules=projections)
        keys = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = {
            name: key.replace(".linear_qkv.", ".in_proj.") for name, key in keys.items()
        }
    return spec


def _move_norms(spec: ModuleSpec, config: MoELPRConfig) -> None:
    """Make it a layer of OLMo 2; Transformer Engine, which fuses norms with projections, is rejected before."""
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attn_bda = layer.mlp_bda = ModuleSpec(module=NormedAdd, params={"config": config})
    attention.q_layernorm = partial(WholeRMSNorm, heads=config.num_attention_heads)
    attention.k_layernorm = partial(WholeRMSNorm, heads=config.num_query_groups)


def _full_attention_layer(config: MoELPRConfig, use_te: bool) -> ModuleSpec:
    if use_te:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _moe_layer(config: MoELPRConfig, use_te: bool, is_linear: bool) -> ModuleSpec:
    spec = _dense_layer(config, use_te, is_linear)
    layer = spec.submodules
    experts: type = GroupedExperts
    if config.moe_grouped_gemm:  # moelpr.train.arguments has checked that Transformer Engine is installed
        from moelpr.model.layers.te_experts import TEGroupedExperts

        experts = TEGroupedExperts
    if not config.norms_after:
        layer.pre_mlp_layernorm = _norm(use_te)
    layer.mlp = partial(
        LPRMoELayer,
        submodules=MoESubmodules(experts=experts, router=LPRRouter),
        original_experts=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    # One checkpoint key for the norm before an MoE layer, whichever implementation wrote it.
    layer.sharded_state_dict_keys_map = {
        name: key for name, key in layer.sharded_state_dict_keys_map.items() if name == "input_layernorm."
    }
    return spec


def _norm(use_te: bool) -> type:
    if not use_te:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
