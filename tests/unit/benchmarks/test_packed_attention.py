"""The random documents of the attention benchmark."""

from benchmarks.comparisons.packed_attention import random_positions


def test_positions_count_from_each_documents_first_token() -> None:
    positions = random_positions(3, 200, 10)
    assert (positions[:, 0] == 0).all()
    steps = positions.diff(dim=1)
    assert ((steps == 1) | (positions[:, 1:] == 0)).all()
    assert 30 < (positions == 0).sum() < 90
