from dataclasses import replace

import pytest
import torch

from benchmarks.train_step import needed_flops, rows_of
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Stage


def test_needed_work_of_a_layer_worked_out_by_hand(spec: ModelSpec) -> None:
    """T = 32 tokens, S = 16, H = 32, F = 48, q = 32, kv = 16, E = 4, V = 128; 10 original rows, 50 new ones."""
    output, projections, attention, router = (
        2 * 32 * 32 * 128,
        2 * 32 * (2048 + 1024),
        2 * 32 * 16 * 32,
        2 * 32 * 32 * 4,
    )
    row = 6 * 32 * 48
    forward = projections + attention + router + 60 * row

    def needed(stage: Stage, num_layers: int) -> float:
        shape = spec.megatron_args | {"num_layers": num_layers, "vocab_size": 128, "add_qkv_bias": False}
        moe = replace(spec.moe, layers=tuple(range(num_layers)))
        llama = replace(spec, family="llama", megatron_args=shape, moe=moe)  # without biases
        return needed_flops(llama, stage, 2, [(10, 50)] * num_layers)

    assert needed("stage2", 1) == pytest.approx(2 * output + forward + router)
    assert needed("stage1", 1) == pytest.approx(2 * output + forward + router + 50 * row + 50 * row / 3)
    above = forward + projections + 2 * attention + router + 60 * row + router
    assert needed("stage2", 2) == pytest.approx(2 * output + forward + router + above)


def test_copies_of_the_original_expert_that_a_token_chose_are_one_row() -> None:
    choices = torch.tensor([[0, 1], [1, 0], [2, 0], [3, 2], [1, 4]])
    assert rows_of(choices, original_copies=2) == (4, 4)
    assert rows_of(choices, original_copies=1) == (3, 7)
