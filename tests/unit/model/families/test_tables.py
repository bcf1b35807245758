import pytest

from moelpr.model.families.families import FAMILIES
from moelpr.model.families.moe_classes import GRANITE_MOE, MIXTRAL
from moelpr.model.families.tables import pieces
from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.model.stages import part_of, trained_parts

# Some names of the others are slices; test_moe_classes.py, test_families.py and test_hybrid.py test them.
UNSTACKED = [
    name
    for name, kind in FAMILIES.items()
    if kind.moe_class is not GRANITE_MOE and not kind.dense_names and not kind.attention.is_hybrid
]


def experts_of(family: str) -> tuple[str, dict[str, str]]:
    """The prefix of an MoE layer's tensors and the names of an expert's matrices, from the stock MoE classes."""
    if FAMILIES[family].moe_class is MIXTRAL:
        return "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    return "mlp", {name: f"{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("family", UNSTACKED)
def test_stage_1_trains_routers_and_new_experts_of_the_stock_class(family: str, dense_spec: ModelSpec) -> None:
    spec = ModelSpec(family, "float32", dense_spec.megatron_args, MoeSpec(2, 2, (0, 1, 2), num_original_experts=3))
    mlp, names = experts_of(family)
    expected = {f"model.layers.{i}.{mlp}.gate.weight" for i in range(3)} | {
        f"model.layers.{i}.{mlp}.experts.{j}.{name}.weight" for i in range(3) for j in (3, 4) for name in names.values()
    }
    plan = list(pieces(FAMILIES[family].table, spec))
    assert {name for piece in plan if piece.is_trained for name in piece.hf_names} == expected
    for piece in plan:
        assert piece.is_trained == (part_of(piece.key) in trained_parts("stage1")), piece.key
