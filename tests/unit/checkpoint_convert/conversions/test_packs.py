"""Packs: any order gives the same bits, removing one restores the model before it, and no text is needed."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from checkpoint_convert import pack as packer
from checkpoint_convert.card.upload import Upload
from checkpoint_convert.common.settings import MoeClassFlags, TextSettings
from checkpoint_convert.conversions.packs import Pack, PackedModel, _stored, build_model, make_pack, read_sums
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.calibration import Inputs
from tests.support.experts import EXPANDED, KEPT, trained, with_tokenizer
from tests.support.hf_models import edit_json, edit_tensors, files_of, load_stock, tensors_of


def settings(save: Path) -> TextSettings:
    return TextSettings(save=save, max_tokens=1000, device="cpu")


@pytest.fixture(scope="module")
def folder(make_qwen2: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its kept sums, and packs of two languages."""
    folder = tmp_path_factory.mktemp("packs")
    base = with_tokenizer(Path(shutil.copytree(make_qwen2(), folder / "base")))
    make_pack(base, "base", None, KEPT, settings(folder / "kept"), "mit")
    for language, texts in EXPANDED.items():
        expert = trained(base, folder / f"expert-{language}", texts)
        make_pack(base, "owner/base", expert, {language: texts}, settings(folder / language), "mit", "60 steps")
    return folder


def built(folder: Path, names: list[str], save: Path, kept: str = "kept") -> Path:
    build_model(folder / "base", folder / kept, [folder / name for name in names], MoeClassFlags(save=save))
    return save


def test_order_does_not_matter_and_removing_restores_the_model_before(folder: Path, tmp_path: Path) -> None:
    one = built(folder, ["el"], tmp_path / "one")
    both, other = (built(folder, its, tmp_path / its[0]) for its in (["el", "hu"], ["hu", "el"]))
    assert files_of(both) == files_of(other) != files_of(one)
    assert files_of(built(folder, ["el"], tmp_path / "again")) == files_of(one)
    assert PackedModel.read(both).packs == {"el": ["el"], "hu": ["hu"]} and "packs.json" in Upload.of(both).files
    assert "base_model: owner/base\nlanguage:\n- el\n- hu\nlicense: mit\n" in (both / "README.md").read_text()
    copy = Path(shutil.copytree(folder / "el", tmp_path / "another" / "hu"))
    (copy / "README.md").write_text((copy / "README.md").read_text().replace("license: mit", "license: cc-by-4.0"))
    build_model(folder / "base", folder / "kept", [copy, folder / "hu"], MoeClassFlags(save=tmp_path / "of-copy"))
    assert PackedModel.read(tmp_path / "of-copy").packs == {"hu (el)": ["el"], "hu (hu)": ["hu"]}
    assert "license: other\nlicense_name: cc-by-4.0-and-mit\n" in (tmp_path / "of-copy" / "README.md").read_text()
    actual, expected = tensors_of(tmp_path / "of-copy"), tensors_of(both)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_pack_says_what_it_is(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("el", "kept"):
        packer.show(packer.ShowSettings(pack=folder / name))
    shown, card = capsys.readouterr().out, (folder / "el" / "README.md").read_text()
    assert re.search(r"base: owner/base \(SHA.*\nlanguages: el\nheld out: el \d+ tokens\nloss on it: .* → ", shown)
    assert "license: mit\ntrained: 60 steps\nlayers with sums: " in shown and "base_model: owner/base\n" in card
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (folder / "el").iterdir())
    with open(folder / "el" / "README.md", "a") as file:  # on the Hub's page, or by moelpr model card
        file.write("More.")
    packer.show(packer.ShowSettings(pack=folder / "el"))
    assert "base: base (SHA" in shown and "languages: none: sums of text to keep" in shown
    assert Upload.of(folder / "kept").files


def test_a_built_model_learned_and_keeps(folder: Path, tmp_path: Path) -> None:
    model = load_stock(built(folder, ["el", "hu"], tmp_path / "model"), "Qwen2MoeForCausalLM")
    tokenizer, base = AutoTokenizer.from_pretrained(folder / "base"), load_stock(folder / "base")
    for name, texts in EXPANDED.items():
        tokens = torch.tensor([[0, *tokenizer(text).input_ids] for text in texts])
        experts = [base, load_stock(folder / f"expert-{name}"), model]
        with torch.no_grad():
            before, learned, result = (one(input_ids=tokens, labels=tokens).loss.item() for one in experts)
        assert before - result > 0.6 * (before - learned)
    tokens = torch.tensor([[0, *tokenizer(text).input_ids] for text in KEPT["first"] + KEPT["second"]])
    with torch.no_grad():
        old, *others = (one(tokens).logits.log_softmax(-1) for one in experts)
    of_expert, of_model = ((old.exp() * (old - new)).sum(-1).mean().item() for new in others)
    assert of_model < 0.5 * of_expert
    record = Pack.read(folder / "el")
    assert (record.languages, record.license, record.trained) == (["el"], "mit", "60 steps")
    assert record.losses is not None and record.losses[1] < record.losses[0] - 1


def test_what_is_no_pack_of_this_base_is_one_sentence(folder: Path, tmp_path: Path, exit_code, refused, capsys) -> None:
    names = "ffns", "short", "cut", "base", "nan", "lost", "sums"
    copies = {name: Path(shutil.copytree(folder / "el", tmp_path / name)) for name in names}
    edit_tensors(copies["ffns"], lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    for name in ("short", "cut"):
        os.truncate(copies[name] / "sums.safetensors", 2000)
    edit_json(copies["base"] / "pack.json", base_sha256="0" * 64)
    edit_tensors(copies["nan"], lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    (copies["lost"] / "sums.safetensors").unlink()
    sums = load_file(copies["sums"] / "sums.safetensors")
    save_file(sums | {"1.correlations": sums["1.correlations"] * float("nan")}, copies["sums"] / "sums.safetensors")
    for name in ("short", "base", "nan", "sums"):
        (copies[name] / "checksums.json").unlink(missing_ok=True)
    for pack, message in (
        (copies["ffns"], "exactly the FFNs"),
        (copies["short"], "sums.safetensors"),
        (copies["cut"], "sums.safetensors"),
        (copies["base"], "of another base"),
        (copies["nan"], "mlp.up_proj.weight contains NaN"),
        (copies["lost"], "sums.safetensors is missing or can't be read; download or copy the pack again"),
        (copies["sums"], "layer 1 has sums of no text"),
        (folder / "kept", "has sums of text to keep and no FFNs; pass it as --kept"),
        (folder / "base", "no pack.json"),
        (folder / "hu", "hu twice"),
    ):
        words = folder / "base", folder / "hu", pack, "--kept", folder / "kept", "--save", tmp_path / "out"
        assert message in refused(packer.build, *words) and not (tmp_path / "out").exists()
    words = folder / "base", folder / "expert-el", "--save", tmp_path / "out", "--text"
    assert "LANGUAGE=greek.jsonl" in refused(packer.make, *words, "greek=greek.jsonl")
    (tmp_path / "el.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in EXPANDED["el"]))
    words = folder / "expert-el", folder / "base", "--save", tmp_path / "swapped", "--text", f"el={tmp_path}/el.jsonl"
    assert exit_code(packer.make, *words) == 0 and "has not learned el; pass BASE before" in capsys.readouterr().err
    kept = Path(shutil.copytree(folder / "kept", tmp_path / "with-el"))
    edit_json(kept / "pack.json", texts={"first": 9, "el": 9})
    (kept / "checksums.json").unlink()
    words = folder / "base", folder / "el", "--kept", kept, "--save", tmp_path / "out"
    assert "text to keep of el" in refused(packer.build, *words) and not (tmp_path / "out").exists()
    for pack, message in ((copies["cut"], "is truncated"), (copies["sums"], "layer 1 has sums of no text")):
        assert message in refused(packer.show, pack)
    capsys.readouterr()
    assert exit_code(packer.show, folder / "el") == 0
    printed = capsys.readouterr().out
    assert "license: mit" in printed and "layers with sums: 4" in printed


def test_a_pack_of_an_adapter_has_its_factors_and_builds_the_merged_model(folder: Path, tmp_path: Path) -> None:
    base, ours, adapter = folder / "base", TextSettings(save=tmp_path / "pack", device="cpu"), tmp_path / "adapter"
    adapter.mkdir()
    torch.manual_seed(0)
    factors, merged = {}, tensors_of(base)
    for name in [name for name in merged if ".mlp." in name]:
        a, b = torch.randn(2, merged[name].shape[1]), torch.randn(merged[name].shape[0], 2)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        merged[name] = (merged[name].float() + 2 * b @ a).to(merged[name].dtype)
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "auto_map": {"x": "evil.py"}}))
    make_pack(base, "base", adapter, {"el": EXPANDED["el"]}, ours, "mit")
    names = {path.name for path in ours.save.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert "auto_map" not in (ours.save / "adapter_config.json").read_text()
    build_model(base, folder / "kept", [ours.save], MoeClassFlags(save=tmp_path / "model"))
    tensors = tensors_of(tmp_path / "model")
    for name in [name for name in merged if ".mlp." in name]:
        torch.testing.assert_close(tensors[name.replace("mlp.", "mlp.experts.1.")], merged[name])
    upload = Upload.of(ours.save)
    assert upload.files.keys() >= {"pack.json", "sums.safetensors", "adapter_model.safetensors", "checksums.json"}


def test_sums_survive_storage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = Inputs()
    rows = torch.randn(500, 24) * torch.logspace(-3, 3, 24) + 0.1
    inputs.add(0, rows, 1 / 500)
    save_file(_stored(inputs), tmp_path / "sums.safetensors")
    [(gram_HH, mean_H)] = read_sums(tmp_path, 1, 24)
    scale_H = inputs.gram[0].diagonal().sqrt()
    assert ((gram_HH - inputs.gram[0]).abs() <= 1e-3 * scale_H[:, None] * scale_H).all()
    assert torch.equal(mean_H, inputs.mean[0]) and torch.equal(gram_HH, gram_HH.T)
    for num_layers, hidden, message in ((1, 25, "hidden size"), (2, 24, "sums of 2 layers")):
        with pytest.raises(UserError, match=message):
            [*read_sums(tmp_path, num_layers, hidden)]
