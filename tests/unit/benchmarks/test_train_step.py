"""The work that a step needs."""

from benchmarks.train_step import needed_flops
from moelpr.model_spec import ModelSpec


def test_needed_work_of_a_layer_worked_out_by_hand(spec: ModelSpec) -> None:
    """T = 32 tokens, S = 16, H = 32, F = 48, q = 32, kv = 16, E = 4, K = 2, V = 64; 10 rows go to the original."""
    output, projections, attention, router = 2 * 32 * 32 * 64, 2 * 32 * (2048 + 1024), 2 * 32 * 16 * 32, 2 * 32 * 32 * 4
    row = 6 * 32 * 48
    forward = projections + attention + router + 64 * row
    assert needed_flops(spec, "stage2", 2, [10]) == 2 * output + forward + router
    assert needed_flops(spec, "stage1", 2, [10]) == 2 * output + forward + router + 54 * row + 54 * row / 3
    above = forward + projections + 2 * attention + router + 64 * row + router
    assert needed_flops(spec, "stage2", 2, [10, 10]) == 2 * output + forward + router + above
