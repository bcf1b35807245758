"""The comparison finds each kind of difference and calls equal only what is equal."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_convert.hf_to_mcore import hf_to_mcore
from checkpoint_convert.mcore_to_hf import mcore_to_hf
from checkpoint_convert.verify import frozen_max_abs_difference, main, max_abs_difference
from moelpr.errors import run_command


def verify(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["verify", *map(str, words)])
    try:
        run_command(main)
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture
def export(qwen2: Path, tmp_path: Path) -> Path:
    hf_to_mcore(qwen2, tmp_path / "megatron", moe_layers=[0, 3])
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    return tmp_path / "hf"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_dense_checkpoint_and_its_source_are_equal(qwen2: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", num_new_experts=None)
    assert max_abs_difference(qwen2, tmp_path / "megatron") == 0.0
    assert verify(monkeypatch, tmp_path / "megatron", qwen2) == 0
    assert "51 tensors, 0 differ" in capsys.readouterr().out


def test_every_kind_of_difference_is_named(export: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] += 0.25
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["surplus"] = tensors.pop("model.layers.0.mlp.gate.weight")

    # shared_expert_gate is in the stock class only; for us it is zero
    assert verify(monkeypatch, export, tmp_path / "megatron") == 0
    import shutil

    other = Path(shutil.copytree(export, tmp_path / "other"))
    edit(other, spoil)
    assert verify(monkeypatch, export, other) == 1
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["model.norm.weight"] == ["value", "2.500e-01"]
    assert lines["model.layers.1.mlp.up_proj.weight"][0] == "shape"
    assert lines["model.layers.0.mlp.gate.weight"] == ["missing"]
    assert lines["surplus"] == ["extra"]
    assert max_abs_difference(export, other) == float("inf")


def test_tolerance(export: Path, tmp_path: Path, monkeypatch) -> None:
    import shutil

    other = Path(shutil.copytree(export, tmp_path / "other"))
    edit(other, lambda tensors: tensors["model.norm.weight"].add_(0.25))
    assert max_abs_difference(export, other) == pytest.approx(0.25)
    assert verify(monkeypatch, export, other, "--tolerance", 0.3) == 0
    assert verify(monkeypatch, export, other, "--tolerance", 0.2) == 1
    edit(other, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert verify(monkeypatch, export, other, "--tolerance", 1e9) == 1


def test_frozen_tensors_are_compared_with_the_base(qwen2: Path, export: Path, tmp_path: Path, monkeypatch) -> None:
    assert frozen_max_abs_difference(qwen2, export) == 0.0
    assert frozen_max_abs_difference(qwen2, tmp_path / "megatron") == 0.0

    def train(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight") or (".experts." in name and ".experts.0." not in name):
                tensor.add_(1)

    edit(export, train)
    assert frozen_max_abs_difference(qwen2, export) == 0.0
    assert verify(monkeypatch, "--frozen", qwen2, export) == 0
    assert verify(monkeypatch, tmp_path / "megatron", export) == 1
    for name in (
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
    ):
        edit(export, lambda tensors, name=name: tensors[name].add_(0.5))
        assert frozen_max_abs_difference(qwen2, export) == pytest.approx(0.5)
        assert verify(monkeypatch, "--frozen", qwen2, export) == 1
        edit(export, lambda tensors, name=name: tensors[name].copy_(load_frozen(qwen2)[name.replace("experts.0.", "")]))
        assert frozen_max_abs_difference(qwen2, export) == 0.0


def load_frozen(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
