from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.training.training import num_floating_point_operations

from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Stage
from moelpr.train.train import operations_per_sequence

pytestmark = pytest.mark.usefixtures("megatron")

LENGTH = 32


@dataclass
class Trained:
    name: Stage
    train_new_embeddings: bool = False
    train_everything: bool = False
    stage1_experts: str = "all"


def operations(spec: ModelSpec, *trained: Any) -> float:
    settings: Any = SimpleNamespace(spec=spec, stage=Trained(*trained))
    return operations_per_sequence(settings, LENGTH)


def test_full_training_of_a_dense_model_has_megatrons_operations(dense_spec: ModelSpec) -> None:
    args = dict.fromkeys(
        "hybrid_layer_pattern moe_layer_freq num_experts mtp_num_layers multi_latent_attention is_hybrid_model "
        "moe_latent_size experimental_attention_variant attention_output_gate".split()
    )
    shape = dense_spec.megatron_args
    settings: Any = SimpleNamespace(**args | shape, seq_length=LENGTH, padded_vocab_size=128)
    settings.moe_shared_expert_intermediate_size = settings.moe_ffn_hidden_size = None
    expected = num_floating_point_operations(settings, 1)
    assert operations(dense_spec, "dense", False, True) == pytest.approx(expected, rel=0.02)


def test_a_stage_counts_what_it_trains(moe_spec: ModelSpec) -> None:
    everything, stage1, stage2 = (
        operations(moe_spec, *trained) for trained in (("stage1", False, True), ("stage1",), ("stage2",))
    )
    assert everything / 3 < stage2 < stage1 < everything
