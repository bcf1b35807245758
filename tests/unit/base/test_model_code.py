"""No code that a model names is run by what reads it, or named by what is written."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_convert.card.upload import Upload
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.gguf.write import write_gguf
from moelpr.base.errors import UserError
from moelpr.base.model_code import drop_code, refuse_code
from moelpr.measure.evaluate.models import load_model
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import edit_json, make_model, make_qwen2  # noqa: F401

_CLASSES = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
# File -> settings that name code.
HOOKS: dict[str, dict[str, Any]] = {
    "config.json": {
        "auto_map": _CLASSES,
        "attn_implementation": "owner/kernel:attention",
        "experts_implementation": "owner/kernel",
        "custom_pipelines": {"text-generation": {"impl": "own.Own", "pt": ["AutoModel"]}},
        "part": {"auto_map": _CLASSES, "_attn_implementation_internal": "owner/kernel"},
    },
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "owner/repo--own.Own"]}},
    "generation_config.json": {"custom_generate": "owner/repo", "trust_remote_code": True},
}


@pytest.fixture
def base(make_qwen2: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:  # noqa: F811
    """A model with every hook, and the file that its code would write."""
    folder, ran = make_qwen2(tokenizer=True), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import Qwen2Config as Own\n"
    (folder / "custom_generate").mkdir()
    for name in ("own.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    (folder / "generation_config.json").write_text("{}")
    for name, hooks in HOOKS.items():
        edit_json(folder / name, **hooks)
    return folder, ran


def test_the_code_of_a_base_is_neither_run_nor_named_again(base: tuple[Path, Path], tmp_path: Path) -> None:
    folder, ran = base
    hf_to_mcore(folder, tmp_path / "checkpoint", NewExperts(2))
    mcore_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    for written in (tmp_path / "checkpoint", tmp_path / "hf"):
        assert not [*written.rglob("*.py")]
        refuse_code(written)
    logits = [load_model(model).model(torch.arange(9)[None]).logits for model in (folder, tmp_path / "hf")]
    torch.testing.assert_close(*logits)
    assert not ran.exists()


@pytest.mark.parametrize("file", HOOKS)
def test_a_model_that_names_code_is_neither_converted_for_llama_cpp_nor_pushed(base, tmp_path: Path, file: str) -> None:
    folder, ran = base
    for name in HOOKS.keys() - {file}:
        (folder / name).write_text(json.dumps({"kept": 1}))
    for reader in (lambda: write_gguf(folder, tmp_path / "gguf"), lambda: Upload.of(folder)):
        with pytest.raises(UserError, match=file):
            reader()
    assert not ran.exists() and not (tmp_path / "gguf").exists()
    drop_code(folder)
    refuse_code(folder)


def test_an_adapter_beside_a_model_leads_to_no_other_model(make_qwen2: Callable[..., Path]) -> None:  # noqa: F811
    folder = make_qwen2()
    adapter = {"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="adapter_config.json"):
        load_model(folder)


def test_escaped_names_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(r'{"a": [{"auto\u005fmap": {}, "b": 1}], "c": NaN}')
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(UserError):
        refuse_code(tmp_path)
    drop_code(tmp_path)
    assert (tmp_path / "config.json").read_text().split() == '{ "a": [ { "b": 1 } ], "c": NaN }'.split()


@pytest.mark.parametrize("depth", [900, 5000, 200_000])
def test_depth_hides_nothing(tmp_path: Path, depth: int) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {}, "a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(UserError):
        refuse_code(tmp_path)
    with suppress(UserError):
        drop_code(tmp_path)
        refuse_code(tmp_path)
