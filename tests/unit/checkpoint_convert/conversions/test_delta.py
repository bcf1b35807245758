"""Base and delta give the bytes of the export; a wrong base or a damaged delta is refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoint_convert.compare.tensors import compare_frozen, largest_difference
from checkpoint_convert.conversions.delta import apply_delta
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.support.hf_models import edit_json, edit_tensors, files_of


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    hf_to_mcore(base, tmp_path / "megatron", NewExperts(3, moe_layers=[0, 2]), start=Start("random"))
    return tmp_path / "megatron"


def assert_base_and_delta_give_the_export(base: Path, checkpoint: Path, tmp_path: Path, **options) -> None:
    """Both are in tmp_path afterwards, as full and delta."""
    mcore_to_hf(checkpoint, tmp_path / "full", **options)
    mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True, **options)
    apply_delta(base, tmp_path / "delta", tmp_path / "whole")
    assert files_of(tmp_path / "full") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_bytes": 20_000}, {"dtype": "float32"}, {"base_model": "owner/Base-1B"}]
)
def test_base_and_delta_give_the_bytes_of_the_full_export(base, checkpoint, tmp_path, options) -> None:
    assert_base_and_delta_give_the_export(base, checkpoint, tmp_path, **options)


def test_a_delta_has_no_copies_of_the_ffn(base: Path, tmp_path: Path) -> None:
    """They come from the base, in every place."""
    hf_to_mcore(base, tmp_path / "megatron", NewExperts(1, original_copies=2), start=Start("random"))
    assert_base_and_delta_give_the_export(base, tmp_path / "megatron", tmp_path)
    names = load_file(tmp_path / "delta" / "delta.safetensors")
    assert all(".experts.2." in name or name.endswith("mlp.gate.weight") for name in names)
    assert (tmp_path / "whole" / "README-base.md").read_text().endswith("The base.\n")


@pytest.mark.parametrize("recorded", ["float32", "bfloat16", None])
def test_a_base_that_training_rounded_is_rounded_the_same_way(recorded, make_qwen2, tmp_path: Path) -> None:
    """A run in bf16 on fp32 weights, whatever their config.json says."""
    base = Path(shutil.copytree(make_qwen2(torch.float32), tmp_path / "base"))
    edit_json(base / "config.json", torch_dtype=recorded, dtype=recorded)
    hf_to_mcore(base, tmp_path / "rounded", NewExperts(2), start=Start("random"), dtype="bfloat16")
    for dtype in ("bfloat16", "float32"):  # the second as after training, without --dtype of the conversion
        replace(ModelSpec.read(tmp_path / "rounded"), dtype=dtype).write(tmp_path / "rounded")
        with pytest.raises(UserError, match="--dtype bfloat16"):
            mcore_to_hf(tmp_path / "rounded", tmp_path / "fp32", as_delta=True, dtype="float32")
    assert_base_and_delta_give_the_export(base, tmp_path / "rounded", tmp_path, dtype="bfloat16")
    replace(ModelSpec.read(tmp_path / "rounded"), dtype="float16").write(tmp_path / "rounded")  # rounded twice
    with pytest.raises(UserError, match="has bfloat16 and float16, .*--delta"):
        mcore_to_hf(tmp_path / "rounded", tmp_path / "twice", as_delta=True, dtype="bfloat16")


def test_the_base_of_another_round_is_the_previous_moe(checkpoint: Path, tmp_path: Path) -> None:
    mcore_to_hf(checkpoint, tmp_path / "round1")
    hf_to_mcore(tmp_path / "round1", tmp_path / "megatron2", NewExperts(2), start=Start("random"))
    assert_base_and_delta_give_the_export(tmp_path / "round1", tmp_path / "megatron2", tmp_path)
    names = set(load_file(tmp_path / "delta" / "delta.safetensors"))
    assert {name.split(".experts.")[1][0] for name in names if ".experts." in name} == {"4", "5"}


def test_a_delta_contains_only_routers_and_new_experts(checkpoint: Path, tmp_path: Path) -> None:
    mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True)
    files = {"README.md", "checksums.json", "delta.safetensors", "delta_config.json"}
    assert {path.name for path in (tmp_path / "delta").iterdir()} == files
    names = set(load_file(tmp_path / "delta" / "delta.safetensors"))
    mlp = [f"model.layers.{i}.mlp" for i in (0, 2)]
    assert names == {f"{m}.gate.weight" for m in mlp} | {
        f"{m}.experts.{j}.{name}_proj.weight" for m in mlp for j in (1, 2, 3) for name in ("gate", "up", "down")
    }
    content = json.loads((tmp_path / "delta" / "delta_config.json").read_text())
    assert content["base_model"] == "Base-1B"
    assert content["experts"] == json.loads(json.dumps(asdict(MoeSpec(3, 2, (0, 2)))))
    listed = {tensor["name"]: tensor for tensor in content["tensors"]}
    assert listed["model.layers.0.mlp.experts.0.up_proj.weight"]["base"] == "model.layers.0.mlp.up_proj.weight"
    assert "apply_delta --base Base-1B" in (tmp_path / "delta" / "README.md").read_text()


def assert_apply_fails(base: Path, delta: Path, save: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        apply_delta(base, delta, save)
    assert "\n" not in str(caught.value)
    assert not save.exists() and not list(save.parent.glob(".*"))


def test_a_wrong_base_is_rejected_by_name(base: Path, checkpoint: Path, make_qwen2, tmp_path: Path) -> None:
    mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True)
    weights, out = base / "model.safetensors", tmp_path / "out"
    assert_apply_fails(make_qwen2(torch.bfloat16, intermediate_size=40), tmp_path / "delta", out, "Base-1B.*--base")
    assert_apply_fails(
        make_qwen2(torch.bfloat16, tie_word_embeddings=True), tmp_path / "delta", out, "Base-1B.*lm_head.*--base"
    )
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        before = load_file(weights)[name]
        edit_tensors(weights, lambda tensors, name=name: tensors[name].view(-1)[5].mul_(1.01))
        assert_apply_fails(base, tmp_path / "delta", out, f"Base-1B.*delta.*{name} .*--base")
        edit_tensors(weights, lambda tensors, name=name, before=before: tensors[name].copy_(before))
    apply_delta(base, tmp_path / "delta", out)


def test_a_damaged_delta_is_rejected(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    delta, out = tmp_path / "delta", tmp_path / "out"
    mcore_to_hf(checkpoint, delta, as_delta=True)
    text = (delta / "delta_config.json").read_text()
    (delta / "delta_config.json").write_text(text.replace('"model.norm.weight"', '"model.norm.weighs"', 1))
    assert_apply_fails(base, delta, out, "delta_config.json is damaged: its checksum differs")
    (delta / "delta_config.json").write_text(text)
    edit_tensors(
        delta / "delta.safetensors", lambda tensors: tensors["model.layers.2.mlp.gate.weight"].view(-1)[0].add_(1)
    )
    assert_apply_fails(base, delta, out, "delta .*model.layers.2.mlp.gate.weight")
    edit_tensors(delta / "delta.safetensors", lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight"))
    assert_apply_fails(base, delta, out, "model.layers.2.mlp.gate.weight")
    (delta / "delta.safetensors").unlink()
    assert_apply_fails(base, delta, out, "delta.safetensors")
    for old, new in (("}", ""), ('"bfloat16"', '"int8"'), ('"base"', '"nowhere"'), ('_version": 1', '_version": 2')):
        (delta / "delta_config.json").write_text(text.replace(old, new, 1))
        assert_apply_fails(base, delta, out, "delta_config.json")
    (delta / "delta_config.json").unlink()
    assert_apply_fails(base, delta, out, "delta_config.json.*--delta")


def test_a_delta_to_an_moe_is_of_its_class(base: Path, tmp_path: Path) -> None:
    granite, second = tmp_path / "granite", tmp_path / "second"
    hf_to_mcore(base, tmp_path / "first", NewExperts(1))
    mcore_to_hf(tmp_path / "first", granite, as_class="granitemoe")
    hf_to_mcore(granite, second, NewExperts(1))
    with pytest.raises(UserError, match="delta to a GraniteMoeForCausalLM must be of its class.*--as"):
        mcore_to_hf(second, tmp_path / "delta", as_delta=True, as_class="qwen2_moe")
    assert_base_and_delta_give_the_export(granite, second, tmp_path, as_class="granitemoe")
    assert largest_difference(compare_frozen(granite, tmp_path / "full")) == 0.0
    mcore_to_hf(second, tmp_path / "other", as_class="qwen2_moe")
    with pytest.raises(UserError, match="join tensors differently.*--as"):
        list(compare_frozen(granite, tmp_path / "other"))


def test_a_model_that_a_delta_cannot_express_is_rejected(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    hf_to_mcore(base, tmp_path / "dense", None)
    with pytest.raises(UserError, match="dense.*--delta"):
        mcore_to_hf(tmp_path / "dense", tmp_path / "delta", as_delta=True)
    run = Path(shutil.copytree(checkpoint, tmp_path / "run"))
    (run / "release").rename(run / "iter_0000001")
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"stage": "stage1", "train_everything": True}))
    with pytest.raises(UserError, match="run .*--train-everything.*--delta"):
        mcore_to_hf(run, tmp_path / "delta", as_delta=True)
    (checkpoint / "hf" / "origin.json").unlink()
    with pytest.raises(UserError, match="--base-model"):
        mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True)
    assert not (tmp_path / "delta").exists()
    mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True, base_model="owner/name")
