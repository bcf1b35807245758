"""Megatron in this process, a world of one rank, and a tiny model spec."""

import sys
from collections.abc import Iterator

import pytest

from moelpr.model.megatron import bootstrap
from moelpr.model.model_spec import ModelSpec, MoeSpec

SHAPE = dict(num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2)
SHAPE |= dict(group_query_attention=True, kv_channels=8, max_position_embeddings=64, position_embedding_type="rope")
SHAPE |= dict(rotary_base=10000, normalization="RMSNorm", norm_epsilon=1e-6, rotary_percent=1.0, attention_dropout=0.0)
SHAPE |= dict(hidden_dropout=0.0, init_method_std=0.02, swiglu=True, add_bias_linear=False, add_qkv_bias=True)
SHAPE |= dict(qk_layernorm=False, untie_embeddings_and_output_weights=False, vocab_size=128)


@pytest.fixture(autouse=True)
def reset_moe_state() -> Iterator[None]:
    """Megatron keeps MoE metrics (one value per layer of the first model) and the auxiliary losses' scale globally."""
    yield
    if moe_logging := sys.modules.get("megatron.core.transformer.moe.moe_logging"):
        moe_logging.destroy_moe_metrics_tracker()
    if moe_utils := sys.modules.get("megatron.core.transformer.moe.moe_utils"):
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="session")
def megatron() -> Iterator[None]:
    bootstrap.install_patches()
    from moelpr.model.megatron.bootstrap import single_process

    with single_process():
        yield


@pytest.fixture(scope="session")
def dense_spec() -> ModelSpec:
    return ModelSpec("qwen2", "float32", SHAPE)


@pytest.fixture(scope="session")
def moe_spec() -> ModelSpec:
    return ModelSpec("qwen2", "float32", SHAPE, MoeSpec(num_new_experts=4, topk=2, layers=(0, 1, 2)))
