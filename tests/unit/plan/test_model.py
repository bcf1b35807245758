"""The spec to plan for, and the sizes of its parts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moelpr.model_spec import MoeSpec
from moelpr.plan.model import PartSize, model_parts, padded_vocabulary, upcycled_spec
from moelpr.stages import Part
from tests.unit.plan.conftest import SPEC


def test_the_spec_is_the_one_the_converter_would_write(config_folder: Callable[..., Path]) -> None:
    spec = upcycled_spec(config_folder(), num_new_experts=3, moe_every_k_layers=2)
    assert spec.moe == MoeSpec(3, 2, (1, 3))
    assert spec.megatron_args["ffn_hidden_size"] == 96


def test_the_parts_of_a_model_are_counted_by_layer() -> None:
    """Two layers of hidden size 8, FFN 16, one original and two new experts; vocabulary 100, untied."""
    expert, attention = 3 * 8 * 16, 16 * 8 + 16 + 8 * 8
    in_a_layer = {Part.ATTENTION: attention, Part.NORM: 2 * 8, Part.ORIGINAL_EXPERTS: expert,
                  Part.NEW_EXPERTS: 2 * expert, Part.ROUTER: 3 * 8}  # fmt: skip
    outside = {Part.EMBEDDING: 100 * 8, Part.NORM: 8, Part.OUTPUT_LAYER: 100 * 8}
    expected = {PartSize(part, None, numel) for part, numel in outside.items()}
    expected |= {PartSize(part, layer, numel) for part, numel in in_a_layer.items() for layer in (0, 1)}
    assert set(model_parts(SPEC)) == expected


@pytest.mark.parametrize(("tp", "rows"), [(1, 1024), (4, 1024), (3, 1152)])
def test_the_vocabulary_is_padded_to_128_rows_per_tensor_parallel_rank(tp: int, rows: int) -> None:
    assert padded_vocabulary(1000, tp) == rows
