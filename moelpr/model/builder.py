"""The layers of our GPT models: Megatron's dense layers, and layers with an LPRMoELayer."""

from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig

from moelpr.model.attention import SDPACoreAttention
from moelpr.model.config import MoELPRConfig
from moelpr.model.experts import GroupedExperts
from moelpr.model.gated_delta_net import GatedDeltaNet
from moelpr.model.layer import LPRMoELayer, LPRMoESubmodules
from moelpr.model.norms import RMSNorm, WholeRMSNorm
from moelpr.model.residual import NormedAdd, scaled_bias_dropout_add
from moelpr.model.router import LPRRouter


def block_spec(model_config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The specs of the layers of this pipeline stage."""
    config: MoELPRConfig = model_config.transformer
    use_te = config.transformer_impl == "transformer_engine"
    layers = [
        (_moe_layer if config.is_moe_layer[layer] else _dense_layer)(config, use_te, config.is_linear_layer[layer])
        for layer in _local_layers(config, vp_stage)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(use_te))


def _dense_layer(config: MoELPRConfig, use_te: bool, is_linear: bool) -> ModuleSpec:
    spec = _full_attention_layer(config, use_te)
    if config.residual_multiplier != 1.0:
        spec.submodules.self_attn_bda = spec.submodules.mlp_bda = scaled_bias_dropout_add(config.residual_multiplier)
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
    """Make it a layer of OLMo 2; moelpr.arguments rejects Transformer Engine, which fuses norms with projections."""
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
    if not config.norms_after:
        layer.pre_mlp_layernorm = _norm(use_te)
    layer.mlp = partial(
        LPRMoELayer,
        submodules=LPRMoESubmodules(
            experts=_new_experts(config),
            router=LPRRouter,
            original_experts=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
    )
    # One checkpoint key for the norm before an MoE layer, whichever implementation wrote it.
    layer.sharded_state_dict_keys_map = {
        name: key for name, key in layer.sharded_state_dict_keys_map.items() if name == "input_layernorm."
    }
    return spec


def _new_experts(config: MoELPRConfig) -> type:
    if not config.moe_grouped_gemm:
        return GroupedExperts
    # moelpr.arguments has checked that Transformer Engine is installed.
    from moelpr.model.te_experts import TEGroupedExperts

    return TEGroupedExperts


def _norm(use_te: bool) -> type:
    if not use_te:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _local_layers(config: MoELPRConfig, vp_stage: int | None) -> list[int]:
    """0-based numbers of the layers of this pipeline stage."""
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))
