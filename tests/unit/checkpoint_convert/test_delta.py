"""Base and delta together are the full export, byte for byte; anything else is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint_convert import apply_delta as apply_delta_module
from checkpoint_convert import mcore_to_hf as exporter
from checkpoint_convert.export import apply_delta, mcore_to_hf
from checkpoint_convert.upcycling import Start, hf_to_mcore
from moelpr.errors import UserError, run_command


def assert_same_files(a: Path, b: Path) -> None:
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for path in files:
        assert (a / path).read_bytes() == (b / path).read_bytes(), path


@pytest.fixture
def base(make_qwen2: Callable[..., Path], tmp_path: Path) -> Path:
    """bf16, with a tokenizer, a model card of its own and a folder that a test may spoil."""
    folder = Path(shutil.copytree(make_qwen2(torch.bfloat16, tokenizer=True), tmp_path / "Base-1B"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
    return folder


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    hf_to_mcore(base, tmp_path / "megatron", 3, moe_layers=[0, 2], start=Start("random"))
    return tmp_path / "megatron"


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_bytes": 20_000}, {"dtype": "float32"}, {"base_model": "owner/Base-1B"}]
)
def test_base_and_delta_are_the_full_export_byte_for_byte(
    base: Path, checkpoint: Path, tmp_path: Path, options: dict
) -> None:
    mcore_to_hf(checkpoint, tmp_path / "full", **options)
    mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True, **options)
    apply_delta(base, tmp_path / "delta", tmp_path / "whole")
    assert_same_files(tmp_path / "full", tmp_path / "whole")
    assert (tmp_path / "whole" / "README-base.md").read_text().endswith("The base.\n")


def test_a_base_that_training_rounded_is_rounded_alike(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    """A run in bf16 on an fp32 base."""
    base = make_qwen2(torch.float32)
    hf_to_mcore(base, tmp_path / "rounded", 2, start=Start("random"), dtype="bfloat16")
    mcore_to_hf(tmp_path / "rounded", tmp_path / "fp32", as_delta=True, dtype="float32")
    with pytest.raises(UserError, match="checksum"):
        apply_delta(base, tmp_path / "fp32", tmp_path / "whole")
    mcore_to_hf(tmp_path / "rounded", tmp_path / "full", dtype="bfloat16")
    mcore_to_hf(tmp_path / "rounded", tmp_path / "bf16", as_delta=True, dtype="bfloat16")
    apply_delta(base, tmp_path / "bf16", tmp_path / "whole")
    assert_same_files(tmp_path / "full", tmp_path / "whole")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_other_families_and_tied_models_go_the_same_way(
    architecture: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model(architecture, tie_word_embeddings=True)
    hf_to_mcore(base, tmp_path / "megatron", 2, start=Start("random"))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "full")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "delta", as_delta=True)
    apply_delta(base, tmp_path / "delta", tmp_path / "whole")
    assert_same_files(tmp_path / "full", tmp_path / "whole")


def test_the_base_of_a_further_round_is_the_moe_before_it(checkpoint: Path, tmp_path: Path) -> None:
    mcore_to_hf(checkpoint, tmp_path / "round1")
    hf_to_mcore(tmp_path / "round1", tmp_path / "megatron2", 2, start=Start("random"))
    mcore_to_hf(tmp_path / "megatron2", tmp_path / "full")
    mcore_to_hf(tmp_path / "megatron2", tmp_path / "delta", as_delta=True)
    names = set(load_file(tmp_path / "delta" / "delta.safetensors"))
    assert {name.split(".experts.")[1][0] for name in names if ".experts." in name} == {"4", "5"}
    apply_delta(tmp_path / "round1", tmp_path / "delta", tmp_path / "whole")
    assert_same_files(tmp_path / "full", tmp_path / "whole")


def test_few_tensors_are_held_at_a_time(make_qwen2: Callable[..., Path], tmp_path: Path, held_bytes) -> None:
    base = make_qwen2(num_hidden_layers=12)
    largest = max(tensor.nbytes for file in base.glob("*.safetensors") for tensor in load_file(file).values())
    hf_to_mcore(base, tmp_path / "megatron", num_new_experts=8)
    held_bytes.take_peak()
    mcore_to_hf(tmp_path / "megatron", tmp_path / "delta", as_delta=True)
    assert 0 < held_bytes.take_peak() <= 3 * largest
    apply_delta(base, tmp_path / "delta", tmp_path / "whole")
    assert 0 < held_bytes.take_peak() <= 3 * largest


def test_a_delta_holds_routers_and_new_experts_alone(checkpoint: Path, tmp_path: Path) -> None:
    mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True)
    assert {path.name for path in (tmp_path / "delta").iterdir()} == {
        "README.md", "delta.safetensors", "delta_config.json",
    }  # fmt: skip
    names = set(load_file(tmp_path / "delta" / "delta.safetensors"))
    mlp = [f"model.layers.{i}.mlp" for i in (0, 2)]
    assert names == {f"{m}.gate.weight" for m in mlp} | {
        f"{m}.experts.{j}.{name}_proj.weight" for m in mlp for j in (1, 2, 3) for name in ("gate", "up", "down")
    }
    content = json.loads((tmp_path / "delta" / "delta_config.json").read_text())
    assert content["base_model"] == "Base-1B"
    assert content["experts"] == {"num_new_experts": 3, "topk": 2, "layers": [0, 2], "num_original_experts": 1}
    listed = {tensor["name"]: tensor for tensor in content["tensors"]}
    assert listed["model.layers.0.mlp.experts.0.up_proj.weight"]["base"] == "model.layers.0.mlp.up_proj.weight"
    with safe_open(tmp_path / "delta" / "delta.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert "apply_delta --base Base-1B" in (tmp_path / "delta" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------ bad input


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refuses(base: Path, delta: Path, save: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        apply_delta(base, delta, save)
    assert "\n" not in str(caught.value)
    assert not save.exists() and not list(save.parent.glob(".*"))


def test_a_wrong_base_is_refused_by_name(base: Path, checkpoint: Path, make_qwen2, tmp_path: Path) -> None:
    mcore_to_hf(checkpoint, tmp_path / "delta", as_delta=True)
    weights, out = base / "model.safetensors", tmp_path / "out"
    refuses(make_qwen2(torch.bfloat16, intermediate_size=40), tmp_path / "delta", out, "Base-1B.*--base")
    refuses(make_qwen2(torch.bfloat16, tie_word_embeddings=True), tmp_path / "delta", out, "Base-1B.*lm_head.*--base")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        before = load_file(weights)[name]
        edit(weights, lambda tensors, name=name: tensors[name].view(-1)[5].mul_(1.01))
        refuses(base, tmp_path / "delta", out, f"Base-1B.*delta.*{name} .*--base")
        edit(weights, lambda tensors, name=name, before=before: tensors[name].copy_(before))
    apply_delta(base, tmp_path / "delta", out)


def test_a_damaged_delta_is_refused(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    delta, out = tmp_path / "delta", tmp_path / "out"
    mcore_to_hf(checkpoint, delta, as_delta=True)
    edit(delta / "delta.safetensors", lambda tensors: tensors["model.layers.2.mlp.gate.weight"].view(-1)[0].add_(1))
    refuses(base, delta, out, "delta .*model.layers.2.mlp.gate.weight")
    edit(delta / "delta.safetensors", lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight"))
    refuses(base, delta, out, "model.layers.2.mlp.gate.weight")
    (delta / "delta.safetensors").unlink()
    refuses(base, delta, out, "delta.safetensors")
    text = (delta / "delta_config.json").read_text()
    for damaged in (text[:-50], text.replace('"bfloat16"', '"int8"', 1), text.replace('"base"', '"nowhere"', 1), "[]"):
        (delta / "delta_config.json").write_text(damaged)
        refuses(base, delta, out, "delta_config.json")
    (delta / "delta_config.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    refuses(base, delta, out, "format_version .*1.* 2")
    (delta / "delta_config.json").unlink()
    refuses(base, delta, out, "delta_config.json.*--delta")


def test_what_no_delta_can_express_is_refused(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    hf_to_mcore(base, tmp_path / "dense", num_new_experts=None)
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


def test_the_commands(base: Path, checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def run(main: Callable[[], None], *words: object) -> int | None:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        try:
            run_command(main)
        except SystemExit as exit:
            return exit.code
        return 0

    delta, whole = tmp_path / "delta", tmp_path / "whole"
    assert run(exporter.main, "--load", checkpoint, "--save", delta, "--delta", "--base-model", "o/Base") == 0
    assert "delta of Qwen2MoeForCausalLM, 4 experts, top-2, bfloat16" in capsys.readouterr().out
    assert run(apply_delta_module.main, "--base", base, "--delta", delta, "--save", whole) == 0
    assert f"{whole}: Qwen2MoeForCausalLM, bfloat16, of o/Base and {delta}" in capsys.readouterr().out
    assert run(apply_delta_module.main, "--base", base, "--delta", delta, "--save", whole) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(apply_delta_module.main, "--base", base, "--delta", base, "--save", tmp_path / "x") == 2
    assert run(apply_delta_module.main, "--base", base, "--delta", delta, "--save", delta, "--overwrite") == 2
