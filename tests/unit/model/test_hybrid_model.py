"""Megatron's HybridModel, where GPTModel's successors go, hosts our layers: docs/design/megatron-trainer.md."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from moelpr.model.builder import RMSNorm, _dense_layer, _moe_layer
from moelpr.model.loading import build_model, logits, transformer_config
from moelpr.model_spec import ModelSpec, MoeSpec


def hybrid_model(spec: ModelSpec) -> HybridModel:
    """The model of `spec` as a stack of layers that are either attention or an FFN."""
    layers = range(spec.megatron_args["num_layers"])
    moe_flags = [flag for layer in layers for flag in (0, int(spec.is_moe_layer(layer)))]
    config = transformer_config(spec, num_layers=len(moe_flags), moe_layer_freq=moe_flags, is_hybrid_model=True)
    dense, moe = (make(config, False, False).submodules for make in (_dense_layer, _moe_layer))

    def layer(kind: type, given: Any, *names: str) -> ModuleSpec:
        parts = {name: getattr(given, name) for name in names}
        return ModuleSpec(module=kind, submodules=TransformerLayerSubmodules(**parts))

    ffn = "pre_mlp_layernorm", "mlp", "mlp_bda"
    stack = HybridStackSubmodules(
        attention_layer=layer(TransformerLayer, dense, "input_layernorm", "self_attention", "self_attn_bda"),
        mlp_layer=layer(MLPLayer, dense, *ffn),
        moe_layer=layer(MoETransformerLayer, moe, *ffn),
    )
    return HybridModel(
        config,
        ModuleSpec(module=HybridStack, submodules=stack),
        spec.megatron_args["vocab_size"],
        spec.megatron_args["max_position_embeddings"],
        hybrid_layer_pattern="".join("*E" if spec.is_moe_layer(layer) else "*-" for layer in layers),
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=spec.megatron_args["rotary_base"],
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def hybrid_name(name: str) -> str:
    """A block becomes two layers."""
    if name.startswith("decoder.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"decoder.layers.{2 * int(layer) + rest.startswith(('mlp.', 'pre_mlp_'))}.{rest}"
    return name.replace("final_layernorm", "final_norm")


def test_it_computes_the_same_bit_for_bit_with_another_last_norm(megatron, dense_spec: ModelSpec, monkeypatch) -> None:
    spec = replace(dense_spec, moe=MoeSpec(num_new_experts=4, topk=2, layers=(0, 2)))
    gpt = build_model(spec)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    monkeypatch.setattr(hybrid_block, "TENorm", RMSNorm)
    hybrid = hybrid_model(spec)
    hybrid.load_state_dict({hybrid_name(name): tensor for name, tensor in gpt.state_dict().items()})
    tokens = torch.arange(40).reshape(2, 20) * 7 % 99
    assert torch.equal(logits(hybrid, tokens), logits(gpt, tokens))


def test_its_last_norm_is_still_transformer_engines(megatron, dense_spec: ModelSpec) -> None:
    """When this fails, HybridModel can be built without a GPU: look again at what the design page says."""
    with pytest.raises(Exception, match="(?i)transformer.?engine|TENorm|NoneType"):
        hybrid_model(dense_spec)
