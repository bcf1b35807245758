import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_convert.compare.tensors import compare, compare_frozen, largest_difference
from checkpoint_convert.conversions.grafted_model import graft
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.hf.hub import Model
from checkpoint_convert.hf.model_files import TOKENIZER_FILES
from checkpoint_convert.hf.safetensors_reader import HfReader
from checkpoint_convert.verify import main
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import copy_of, edit_tensors, load_stock, save_tokenizer, tensors_of, write_export


def test_tensors_that_readers_ignore_make_no_difference(make_qwen2, tmp_path, exit_code) -> None:
    """Old folders of tied models store their output layer and RoPE's frequencies too."""
    source = make_qwen2(tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    old = copy_of(source, add)
    hf_to_mcore(old, tmp_path / "megatron", NewExperts(2))
    assert exit_code(main, source, old) == 0
    assert exit_code(main, "--frozen", old, tmp_path / "megatron") == 0
    edit_tensors(old, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert exit_code(main, source, old) == 1


def test_an_export_that_transformers_has_saved_again_is_equal(base: Path, tmp_path: Path, exit_code) -> None:
    """It writes the tensors of a shared expert that has no width."""
    export, again = write_export(base, tmp_path, NewExperts(2)), tmp_path / "again"
    load_stock(export, "Qwen2MoeForCausalLM").save_pretrained(again)
    for path in export.glob("tokenizer*"):
        shutil.copyfile(path, again / path.name)
    assert any(0 in HfReader(again).shape(name) for name in HfReader(again).names)
    assert not any("shared_expert." in name for name in HfReader(export).names)  # other loaders do not know empty ones
    assert exit_code(main, export, again) == 0
    graft(*(Model(folder, folder.name) for folder in (base, base, again)), tmp_path / "graft")  # type: ignore[call-arg]
    assert exit_code(main, export, tmp_path / "graft") == 0


def test_an_upcycled_checkpoint_and_its_export_are_equal(export: Path, tmp_path: Path, exit_code, capsys) -> None:
    """The stock class has a tensor more in each MoE layer, all zeros, than the checkpoint."""
    num_tensors = len(load_file(export / "model.safetensors"))
    for pair in ((export, tmp_path / "megatron"), (tmp_path / "megatron", export)):
        assert exit_code(main, *pair) == 0
        assert f"{num_tensors} tensors, 0 differ" in capsys.readouterr().out
    edit_tensors(export, lambda tensors: tensors["model.layers.0.mlp.shared_expert_gate.weight"].add_(1))
    assert exit_code(main, export, tmp_path / "megatron") == 1


def test_every_kind_of_difference_is_named_and_the_largest_come_first(export: Path, exit_code, capsys) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] += 0.25
        tensors["model.layers.0.input_layernorm.weight"] += 1
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["surplus"] = tensors.pop("model.layers.0.mlp.gate.weight")

    other = copy_of(export, damage)
    assert exit_code(main, export, other) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[4:6]] == ["model.layers.0.input_layernorm.weight", "model.norm.weight"]
    actual = {line[0]: line[1:] for line in lines if line}
    assert actual["model.norm.weight"] == ["value", "2.500e-01", "1", "of", "32"]
    assert actual["model.layers.1.mlp.up_proj.weight"][0] == "shape"
    assert actual["model.layers.0.mlp.gate.weight"] == ["missing"]
    assert actual["surplus"] == ["extra"]
    assert largest_difference(compare(export, other)) == float("inf")
    other = copy_of(export, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    for flags, num_shown in (((), 20), (("--all",), len(tensors_of(export)))):
        assert exit_code(main, export, other, *flags) == 1
        assert capsys.readouterr().out.count("value") == num_shown


def test_tolerance_and_without_it_every_bit_counts(export: Path, exit_code) -> None:
    other = copy_of(export, lambda tensors: tensors["model.norm.weight"].add_(0.25))
    assert largest_difference(compare(export, other)) == pytest.approx(0.25)
    assert exit_code(main, export, other, "--tolerance", 0.3) == 0
    assert exit_code(main, export, other, "--tolerance", 0.2) == 1
    edit_tensors(other, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert exit_code(main, export, other, "--tolerance", 1e9) == 1
    gate = "model.layers.3.mlp.shared_expert_gate.weight"
    other = copy_of(export, lambda tensors: tensors[gate].copy_(-torch.zeros(1, 32)))
    assert exit_code(main, export, other) == 1
    assert exit_code(main, export, other, "--tolerance", 1e-30) == 0


def test_frozen_tensors_are_compared_with_the_base(qwen2: Path, export: Path, tmp_path: Path, exit_code) -> None:
    assert largest_difference(compare_frozen(qwen2, export)) == 0.0
    assert largest_difference(compare_frozen(qwen2, tmp_path / "megatron")) == 0.0

    def train(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight") or (".experts." in name and ".experts.0." not in name):
                tensor.add_(1)

    edit_tensors(export, train)
    assert exit_code(main, "--frozen", qwen2, export) == 0
    assert exit_code(main, tmp_path / "megatron", export) == 1
    for name in (
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
    ):
        changed = copy_of(export, lambda tensors, name=name: tensors[name].add_(0.5))
        assert largest_difference(compare_frozen(qwen2, changed)) == pytest.approx(0.5)
        assert exit_code(main, "--frozen", qwen2, changed) == 1


def test_every_copy_of_the_ffn_is_frozen(qwen2: Path, tmp_path: Path, exit_code, capsys) -> None:
    write_export(qwen2, tmp_path, NewExperts(4, original_copies=2), noise=0.5)
    for upcycled in (tmp_path / "megatron", tmp_path / "hf"):
        assert exit_code(main, "--frozen", qwen2, upcycled) == 0
    assert exit_code(main, tmp_path / "megatron", tmp_path / "hf") == 0
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    edit_tensors(tmp_path / "hf", lambda tensors: tensors[name].add_(0.5))
    assert exit_code(main, "--frozen", qwen2, tmp_path / "hf") == 1
    assert name in capsys.readouterr().out


def test_all_experts_of_an_moe_base_are_frozen_and_its_routers_are_not(qwen2, export, tmp_path, exit_code, refused):
    """The base of another round of languages: an export that gets more experts."""
    second = write_export(export, tmp_path / "round2", NewExperts(2))
    for upcycled in (tmp_path / "round2" / "megatron", second):
        assert exit_code(main, "--frozen", export, upcycled) == exit_code(main, "--frozen", qwen2, upcycled) == 0
    for number, code in ((6, 0), (2, 1)):  # an expert of the second round, and one of the first
        name = f"model.layers.3.mlp.experts.{number}.up_proj.weight"
        edit_tensors(second, lambda tensors, name=name: tensors[name].add_(1))
        assert exit_code(main, "--frozen", export, second) == code
        assert exit_code(main, "--frozen", qwen2, second) == 0
    assert "7 and 5" in refused(main, "--frozen", second, export)


def test_the_exit_code_depends_on_tensors_and_text(qwen2, export, text, exit_code, capsys, megatron) -> None:
    """The dense base against the freshly upcycled model: equal; after a change of an expert that is not frozen: not."""
    assert exit_code(main, "--frozen", qwen2, export, "--text", text, "--json") == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["equal"] and actual["max_abs_diff"] == 0.0 and actual["max_abs_logit_diff"] < 1e-4
    assert actual["same_next_token"] == 1.0
    edit_tensors(export, lambda tensors: tensors["model.layers.0.mlp.experts.1.down_proj.weight"].add_(1))
    assert exit_code(main, "--frozen", qwen2, export, "--text", text) == 1
    table = capsys.readouterr().out
    assert "0 differ" in table and "text.jsonl" in table
    assert exit_code(main, "--frozen", qwen2, export, "--text", text, "--logit-tolerance", 1e9) == 0
    edit_tensors(export, lambda tensors: tensors["model.layers.0.mlp.experts.1.down_proj.weight"].fill_(torch.nan))
    assert exit_code(main, "--frozen", qwen2, export, "--text", text, "--logit-tolerance", 1e9) == 1


def test_invalid_input_exits_with_one_message_and_code_2(qwen2, make_qwen2, text, tmp_path, refused) -> None:
    bare = Path(shutil.copytree(qwen2, tmp_path / "bare"))
    for name in TOKENIZER_FILES:
        (bare / name).unlink(missing_ok=True)
    other_tokenizer = Path(shutil.copytree(bare, tmp_path / "other"))
    save_tokenizer(other_tokenizer, num_ids=3)
    other_vocabulary = make_qwen2(vocab_size=98)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for arguments, message in (
        ((qwen2, qwen2, "--tolerance", -1), "--tolerance .*0.* -1"),
        ((qwen2, qwen2, "--logit-tolerance", "nan"), "--logit-tolerance .*0.* nan"),
        ((qwen2, tmp_path / "nowhere"), "nowhere"),
        ((qwen2, qwen2, "--text", tmp_path / "nowhere.txt"), "nowhere.txt"),
        ((qwen2, qwen2, "--text", tmp_path / "latin.txt"), "latin.txt"),
        ((bare, bare, "--text", text), "--text .*tokenizer.*bare"),
        ((qwen2, other_tokenizer, "--text", text), "other.*--text"),
        ((qwen2, other_vocabulary, "--text", text), "99 .* 98 .*--text"),
    ):
        error = refused(main, *arguments)
        assert re.search(message, error), error
