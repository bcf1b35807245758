"""The rule against what autograd really keeps, in one process; benchmarks/memory_plan.py does it in whole runs.

Top-K over K experts, so that the numbers do not depend on the routing.
"""

from typing import get_args

import pytest
import torch

from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.plan.layouts import Layout, Recompute
from moelpr.plan.memory import CPU, Run, stage_memories
from moelpr.plan.model import model_parts
from moelpr.stages import MoeStage

pytestmark = pytest.mark.usefixtures("megatron")

SHAPE = {
    "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 16, "max_position_embeddings": 128,
    "position_embedding_type": "rope", "rotary_base": 10000, "normalization": "RMSNorm", "norm_epsilon": 1e-6,
    "swiglu": True, "add_bias_linear": False, "add_qkv_bias": True, "qk_layernorm": False,
    "untie_embeddings_and_output_weights": False, "vocab_size": 256,
}  # fmt: skip
SEQ_LENGTH, MICRO_BATCH_SIZE = 96, 2


@pytest.mark.parametrize("stage", get_args(MoeStage))
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_kept_bytes_are_within_two_percent_of_the_rule(stage: MoeStage, recompute: Recompute) -> None:
    from benchmarks.measured_memory import SavedTensors
    from moelpr.model.freezing import freeze
    from moelpr.model.loading import build_model
    from moelpr.model.router import LPRLossNormalizer

    spec = ModelSpec("qwen2", "float32", SHAPE, MoeSpec(num_new_experts=1, topk=2, layers=(0, 2)))
    settings: dict[str, object] = {"moe_aux_loss_coeff": 0.01} if stage == "stage1" else {"lpr_loss_coeff": 0.1}
    if recompute == "selective":
        settings |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    elif recompute == "full":
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (model,) = freeze([build_model(spec, **settings)], stage)
    LPRLossNormalizer.set_weight(torch.tensor(1.0))
    tokens = torch.randint(0, 256, (MICRO_BATCH_SIZE, SEQ_LENGTH))
    saved = SavedTensors()
    saved.parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        loss = model.train()(
            tokens,
            torch.arange(SEQ_LENGTH).expand_as(tokens),
            attention_mask=None,
            labels=tokens,
            padding_mask=torch.ones_like(tokens, dtype=torch.uint8),
        )
        loss.sum().backward()
    run = Run(stage, SEQ_LENGTH, MICRO_BATCH_SIZE, MICRO_BATCH_SIZE, "fp32", CPU)
    layout = Layout(recompute=recompute, distributed_optimizer=False)
    planned = stage_memories(spec, model_parts(spec), layout, run)[0].activation_bytes
    assert saved.peak == pytest.approx(planned, rel=0.02)
    del loss
    assert saved.live == 0, "the counter itself forgets nothing that autograd has let go of"
