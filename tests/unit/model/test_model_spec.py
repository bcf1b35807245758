import json
from dataclasses import replace
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.model.model_spec import FILE_NAME, ModelSpec, MoeSpec, NewTokens


def test_original_and_new_experts_together_are_all_experts() -> None:
    assert MoeSpec(num_new_experts=4, topk=2, layers=(0,)).num_experts == 5
    for topk in (1, 7):
        moe = MoeSpec(num_new_experts=4, topk=topk, layers=(0,), num_original_experts=3)
        moe.check(num_layers=1)
        assert moe.num_experts == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_original_experts": 0}, "num_original_experts must be between 1 and 4096, got 0"),
        ({"num_new_experts": 0}, "--num-new-experts must be between 1 and 1024, got 0"),
        ({"num_new_experts": 10**9}, "--num-new-experts must be between 1 and 1024, got 1000000000"),
        ({"original_copies": 0}, "--original-copies must be between 1 and 1024, got 0"),
        ({"original_copies": 10**9, "topk": 10**9}, "--original-copies must be between 1 and 1024, got"),
        ({"original_copies": 3}, "--original-copies must be at most --topk, got 3 and 2"),
        ({"num_original_experts": 10**9}, "between 1 and 4096, got 1000000000"),
        ({"topk": 0}, "top-0 .*--topk between 1 and 7"),
        ({"topk": 8}, r"top-8 .* 7 experts \(4 new \+ 3 original\).*--topk between 1 and 7"),
        ({"topk": 1, "original_copies": 2}, "--original-copies must be at most --topk, got 2 and 1"),
        ({"layers": ()}, "--moe-layers"),
        ({"layers": (1,)}, "no layer 1; pass --moe-layers from 0 to 0"),
        ({"layers": (0, 0)}, "without repetition"),
    ],
)
def test_settings_that_cannot_be_trained_are_rejected(changes: dict, message: str) -> None:
    moe = MoeSpec(num_new_experts=4, topk=2, layers=(0,), num_original_experts=3)
    with pytest.raises(UserError, match=message):
        replace(moe, **changes).check(num_layers=1)


def _grown(spec: ModelSpec, tokens: NewTokens) -> ModelSpec:
    return replace(spec, megatron_args=spec.megatron_args | {"vocab_size": tokens.vocab_size}, new_tokens=tokens)


def test_new_tokens_take_spare_rows_first(moe_spec: ModelSpec) -> None:
    rows = moe_spec.megatron_args["vocab_size"]
    assert NewTokens(first=rows - 5, number=8, base_vocab_size=rows).vocab_size == rows + 3
    assert NewTokens(first=rows - 5, number=3, base_vocab_size=rows).vocab_size == rows
    _grown(moe_spec, NewTokens(first=rows, number=1, base_vocab_size=rows)).check()


def test_only_a_model_with_new_tokens_has_them_in_its_file(tmp_path: Path, moe_spec: ModelSpec) -> None:
    moe_spec.write(tmp_path)
    assert "new_tokens" not in json.loads((tmp_path / FILE_NAME).read_text())
    spec = _grown(moe_spec, NewTokens(first=90, number=20, base_vocab_size=moe_spec.megatron_args["vocab_size"]))
    spec.write(tmp_path)
    assert ModelSpec.read(tmp_path) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(dtype="int8"), "must be one of float32, bfloat16, float16, got 'int8'"),
        (lambda content: content["megatron_args"].pop("hidden_size"), "hidden_size is missing"),
        (lambda content: content["megatron_args"].update(window_sjze=[7, 0]), "window_sjze is unknown"),
        (lambda content: content["megatron_args"].update(num_layers=10**9), "num_layers .* 10000, got"),
        (lambda content: content["megatron_args"].update(rotary_percent=0.5), "rotary_percent .*, got 0.5"),
        (lambda content: content["megatron_args"].update(num_query_groups=3), "multiple of num_query_groups"),
        (lambda content: content["megatron_args"].update(use_rope_scaling=True), "lacks rope_scaling_factor"),
        (lambda content: content["new_tokens"].update(first=10**6), "new_tokens.first must be at most base_vocab_size"),
        (lambda content: content["new_tokens"].update(number=10**6), "vocab_size must be 1000090, got"),
    ],
)
def test_an_invalid_file_is_a_user_error(tmp_path, moe_spec, change, message) -> None:
    _grown(moe_spec, NewTokens(first=90, number=20, base_vocab_size=96)).write(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    change(content)
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{FILE_NAME}.*{message}"):
        ModelSpec.read(tmp_path)


def test_a_folder_without_the_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no {FILE_NAME}.*moelpr model convert"):
        ModelSpec.read(tmp_path)
