"""Our models on HybridModel are those that Megatron's GPTModel makes of the same layers, bit for bit.

GPTModel is what old checkpoints and runs were written by: docs/design/megatron-trainer.md.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from moelpr.model.layers.builder import layer_pattern, layer_spec
from moelpr.model.layers.loading import build_model, transformer_config
from moelpr.model.layers.norms import RMSNorm
from moelpr.model.model_spec import ModelSpec, MoeSpec

UNTIED = {"untie_embeddings_and_output_weights": True}
LLAMA_3 = UNTIED | {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "rotary_base": 500000}
GRANITE = {"rotary_interleaved": True, "residual_multiplier": 0.22, "softmax_scale": 0.2}
GRANITE |= {"use_mup": True, "mup_embedding_mult": 12.0, "mup_output_mult": 0.1}
OLMO_2 = {"norms_after": True, "qk_layernorm": True}
QWEN_3_5 = {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": [1, 0, 1]}
QWEN_3_5 |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
QWEN_3_5 |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "rotary_percent": 0.5}
QWEN_3_5 |= {"attention_output_gate": True, "apply_layernorm_1p": True, "qk_layernorm": True}
SHAPES = {"tied": {}, "untied": UNTIED, "llama 3": LLAMA_3, "granite": GRANITE, "olmo 2": OLMO_2, "qwen 3.5": QWEN_3_5}
DENSE, ALL_MOE, SOME_MOE = None, MoeSpec(4, topk=2, layers=(0, 1, 2)), MoeSpec(4, topk=2, layers=(0, 2))
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = [(shape, moe, {}) for shape in SHAPES for moe in (DENSE, ALL_MOE)]
CASES += [("tied", SOME_MOE, {}), ("tied", ALL_MOE, FULL), ("qwen 3.5", SOME_MOE, FULL)]


def gpt_model(spec: ModelSpec, **settings: Any) -> GPTModel:
    config, shape = transformer_config(spec, **settings), spec.megatron_args
    layers = [layer_spec(config, layer) for layer in range(config.num_layers)]
    is_tied, scales = not shape["untie_embeddings_and_output_weights"], shape.get("use_rope_scaling", False)
    rope = {"rotary_base": shape["rotary_base"], "rotary_percent": shape["rotary_percent"], "rope_scaling": scales}
    sizes = TransformerBlockSubmodules(layers, RMSNorm), shape["vocab_size"], shape["max_position_embeddings"]
    return GPTModel(config, *sizes, share_embeddings_and_output_weights=is_tied, position_embedding_type="rope", **rope)


def trained(model: Any) -> torch.Tensor:
    """The losses of a micro-batch with half of its languages original; gradients are in the parameters."""
    model.config.lpr_token_weight = torch.tensor(0.01)
    tokens = torch.arange(80).reshape(2, 40) * 7 % 99
    bits = torch.arange(80).reshape(2, 40) % 40 < 20
    losses = model.train()(tokens, tokens, None, labels=tokens.roll(-1), padding_mask=bits.to(torch.uint8))
    losses.sum().backward()
    return losses


@pytest.mark.parametrize(("shape", "moe", "settings"), CASES)
def test_it_is_gpt_model_bit_for_bit(megatron, dense_spec, shape: str, moe: MoeSpec | None, settings: dict) -> None:
    spec = replace(dense_spec, megatron_args=dense_spec.megatron_args | SHAPES[shape], moe=moe)
    models: list[Any] = []
    for build in (gpt_model, build_model):
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        models.append(build(spec, **settings, **{"lpr_loss_coeff": 0.1} if moe else {}))
    gpt, ours = models
    assert isinstance(ours, HybridModel)
    # The distributed optimizer divides parameters in this order.
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in gpt.named_parameters()]
    saved, expected = ours.sharded_state_dict(), gpt.sharded_state_dict()
    assert list(saved) == list(expected)
    for name, entry in expected.items():
        assert type(saved[name]) is type(entry) and saved[name].key == entry.key, name
    for (name, parameter), other in zip(ours.named_parameters(), gpt.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    gpt.load_state_dict(ours.state_dict())
    assert torch.equal(trained(ours), trained(gpt))
    for (name, parameter), other in zip(ours.named_parameters(), gpt.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad) and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("ranks", "chunks", "settings"),
    [
        (1, 1, {}),
        (4, 1, {}),
        (3, 2, {}),
        (3, 1, {"num_layers_in_first_pipeline_stage": 2}),
        (4, 1, {"num_layers_in_last_pipeline_stage": 3}),
        (3, 2, {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 6}),
    ],
)
def test_stages_have_the_layers_of_gpt_models(megatron, dense_spec: ModelSpec, ranks, chunks, settings) -> None:
    spec = replace(dense_spec, megatron_args=dense_spec.megatron_args | {"num_layers": 12})
    settings |= {"pipeline_model_parallel_size": ranks, "pipeline_dtype": torch.float32}
    virtual = {"virtual_pipeline_model_parallel_size": chunks} if chunks > 1 else {}
    config = transformer_config(spec, **settings, **virtual)
    stages = layer_pattern(config).split("|")
    assert len(stages) == ranks * chunks and sum(map(len, stages)) == 12
    for stage in range(len(stages)):
        chunk, rank = divmod(stage, ranks)
        offset = get_transformer_layer_offset(config, chunk if chunks > 1 else None, rank)
        assert sum(map(len, stages[:stage])) == offset or not stages[stage]
