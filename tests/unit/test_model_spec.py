"""`model_spec.json` through its dataclasses: what it may say about experts, and files of before."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moelpr.errors import UserError
from moelpr.model_spec import FILE_NAME, ModelSpec, MoeSpec


def test_original_and_new_experts_together_are_all_experts() -> None:
    assert MoeSpec(num_new_experts=4, topk=2, layers=(0,)).num_experts == 5
    moe = MoeSpec(num_new_experts=4, topk=7, layers=(0,), num_original_experts=3)
    assert moe.num_experts == 7
    moe.check(num_layers=1)  # K = E


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_original_experts": 0}, "found 0 original experts"),
        ({"num_new_experts": 0}, "found 0 new experts"),
        ({"topk": 1}, "K = 1 can't be trained"),
        ({"topk": 8}, r"the layer has 7 \(4 new \+ 3 original\); use --topk between 2 and 7"),
    ],
)
def test_experts_that_cannot_be_trained_are_refused(changes: dict[str, int], sentence: str) -> None:
    moe = MoeSpec(num_new_experts=4, topk=2, layers=(0,), num_original_experts=3)
    with pytest.raises(UserError, match=sentence):
        replace(moe, **changes).check(num_layers=1)


def test_a_file_that_does_not_count_the_original_experts_has_one(tmp_path: Path, moe_spec: ModelSpec) -> None:
    moe_spec.write(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    assert content["moe"].pop("num_original_experts") == 1
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    assert ModelSpec.read(tmp_path) == moe_spec


def test_the_number_of_original_experts_is_written_and_read(tmp_path: Path, moe_spec: ModelSpec) -> None:
    assert moe_spec.moe is not None
    spec = replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=3))
    spec.write(tmp_path)
    assert ModelSpec.read(tmp_path) == spec


@pytest.mark.parametrize("number", ["2", 2.5, None, True])
def test_a_number_of_experts_that_is_no_number_is_refused(tmp_path: Path, moe_spec: ModelSpec, number: object) -> None:
    moe_spec.write(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    content["moe"]["num_original_experts"] = number
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=FILE_NAME):
        ModelSpec.read(tmp_path)
