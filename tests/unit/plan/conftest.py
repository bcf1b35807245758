"""A model small enough to work out by hand, and models as config.json folders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moelpr.model.megatron import bootstrap
from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.plan.memory import Kernels, Routing, Workload
from tests.unit.conftest import SHAPE

bootstrap.install_patches()  # before the tests of this folder import Megatron

SMALL_SHAPE = SHAPE | dict(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1)
SMALL_SHAPE |= dict(kv_channels=4, untie_embeddings_and_output_weights=True, vocab_size=100)
SPEC = ModelSpec("qwen2", "bfloat16", SMALL_SHAPE, MoeSpec(num_new_experts=2, topk=2, layers=(0, 1)))
# 4 tokens per micro-batch, 4 micro-batches; of a token's two rows, 0.5 go to the original expert and 1.5 to new ones.
WORKLOAD = Workload("stage1", seq_length=4, micro_batch_size=1, global_batch_size=4, kernels=Kernels(norm_output=False))
ROUTING = Routing(original_rows=0.5, new_rows=1.5)

CONFIG = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=1000, hidden_size=64)
CONFIG |= dict(intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
CONFIG |= dict(max_position_embeddings=4096, tie_word_embeddings=False, rope_theta=10000.0)


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write config.json, with changes, to a new folder."""

    def write(**changes: object) -> Path:
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        return folder

    return write
