import torch

from benchmarks.train_step import needed_flops, rows_of
from moelpr.model.model_spec import ModelSpec


def test_needed_work_of_a_layer_worked_out_by_hand(spec: ModelSpec) -> None:
    """T = 32 tokens, S = 16, H = 32, F = 48, q = 32, kv = 16, E = 4, V = 64; 10 original rows, 50 new ones."""
    output, projections, attention, router = 2 * 32 * 32 * 64, 2 * 32 * (2048 + 1024), 2 * 32 * 16 * 32, 2 * 32 * 32 * 4
    row = 6 * 32 * 48
    forward = projections + attention + router + 60 * row
    rows = (10, 50)
    assert needed_flops(spec, "stage2", 2, [rows]) == 2 * output + forward + router
    assert needed_flops(spec, "stage1", 2, [rows]) == 2 * output + forward + router + 50 * row + 50 * row / 3
    above = forward + projections + 2 * attention + router + 60 * row + router
    assert needed_flops(spec, "stage2", 2, [rows, rows]) == 2 * output + forward + router + above


def test_copies_of_the_original_expert_that_a_token_chose_are_one_row() -> None:
    choices = torch.tensor([[0, 1], [1, 0], [2, 0], [3, 2], [1, 4]])
    assert rows_of(choices, original_copies=2) == (4, 4)
    assert rows_of(choices, original_copies=1) == (3, 7)
