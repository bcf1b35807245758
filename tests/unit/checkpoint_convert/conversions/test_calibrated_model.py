"""Calibrated routers keep text with the original expert, whose output is the base's, and change nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_convert import calibrate as calibrator
from checkpoint_convert.common.settings import RoutingSettings, named_texts
from checkpoint_convert.conversions import calibrated_model
from checkpoint_convert.conversions.calibrated_model import write_calibrated
from checkpoint_convert.conversions.routed_model import RoutedModel
from moelpr.base.errors import UserError
from moelpr.measure.report.findings import Findings, Point, TextResult
from moelpr.model.families.new_experts import NewExperts
from tests.support.commands import moelpr
from tests.support.experts import EXPANDED, KEPT, with_tokenizer
from tests.support.hf_models import edit_json, load_stock, tensors_of, write_export

GREEK = {"el": EXPANDED["el"]}


@pytest.fixture
def base(make_qwen2: Callable[..., Path], tmp_path: Path) -> Path:
    return with_tokenizer(Path(shutil.copytree(make_qwen2(), tmp_path / "base")))


def upcycled(base: Path, folder: Path, copies: int = 2, topk: int = 2) -> Path:
    return write_export(base, folder, NewExperts(3, topk=topk, original_copies=copies), noise=0.5)


def settings(save: Path, **dial) -> RoutingSettings:
    return RoutingSettings(save=save, max_tokens=1000, device="cpu", **dial)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("LlamaForCausalLM", {"tie_word_embeddings": True}), ("GraniteForCausalLM", {"residual_multiplier": 0.22})],
)
def test_only_routers_change_and_kept_text_is_nearer_to_the_base(
    architecture: str, changes: dict, topk: int, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = with_tokenizer(Path(shutil.copytree(make_model(architecture, **changes), tmp_path / "base")))
    model, save = upcycled(base, tmp_path, topk, topk), tmp_path / "calibrated"
    actual = write_calibrated(model, base, KEPT, GREEK, settings(save, max_distance=9))
    old, new = tensors_of(model), tensors_of(save)
    assert old.keys() == new.keys()
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert len(changed) == 4 and all(".gate." in name or ".router." in name for name in changed)
    for name in changed:
        assert torch.equal(new[name][topk:], old[name][topk:])
        assert all(torch.equal(new[name][0], row) for row in new[name][:topk])
    card = (save / "README.md").read_text()
    assert card.index("## Training") < card.index("### Routers") < card.index("## Use")
    its = actual.findings
    assert RoutedModel.read(save) == actual and actual.experts == {} and its.max_distance == 9
    assert its.result.distance < 0.5 * its.learned.distance and len(its.tried) == 3
    assert all(
        (its.texts[name].shares[0] > 0.75) if name in KEPT else its.texts[name].shares[0] < 0.4 for name in its.texts
    )
    assert load_stock(save).config.num_original_experts == topk


def test_what_cannot_be_calibrated_is_one_sentence(base: Path, tmp_path: Path, monkeypatch) -> None:
    model, save = upcycled(base, tmp_path), tmp_path / "calibrated"
    one_copy = upcycled(base, tmp_path / "one", 1)
    earlier = Path(shutil.copytree(model, tmp_path / "earlier"))
    edit_json(earlier / "config.json", num_original_experts=3)
    for model_or_not, its_base, expanded, message in (
        (base, base, GREEK, "is dense"),
        (model, model, GREEK, "--base .* is not the dense base"),
        (model, base, {"el": ["A"]}, "el has 0 tokens"),
        (one_copy, base, GREEK, "--original-copies 2"),
        (earlier, base, GREEK, "1 of 3 original ones"),
        (model, base, GREEK, "no better than the base"),  # its experts have learned nothing
    ):
        with pytest.raises(UserError, match=message):
            write_calibrated(model_or_not, its_base, KEPT, expanded, settings(save))
        assert not save.exists()
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in GREEK["el"]))
    flags = f"--model {model} --base {base} --save {save} --data el={file}".split()
    for more, message in (
        (["--expanded-languages", "hu"], "must be among --data"),
        ([], "--data has no text"),
        (["--keep", "1.5"], "--keep .*1.5"),
        (["--max-distance", "-0.1"], "--max-distance .*-0.1"),
        (["--data", f"ell={file}"], "--data has el twice"),
        (["--data", "=x"], "--data must be"),
    ):
        with pytest.raises(UserError, match=message):
            moelpr("model", "calibrate", *flags, "--expanded-languages", "el", *more)


@pytest.mark.parametrize(("distance", "flags"), [(0.3, ()), (0.1, ()), (0.3, ("--max-distance", "0.4"))])
def test_routers_that_are_still_far_from_the_base_are_a_warning(
    distance, flags, tmp_path, monkeypatch, exit_code, capsys
) -> None:
    texts = {"en": TextResult([0.9, 0.1], 0.8, distance), "el": TextResult([0.1, 0.9], 0.0, None, (4.0, 3.0, 3.1))}
    ends = Point(0.0, 4.0), Point(0.5, 3.0), Point(distance, 3.1)
    record = RoutedModel("m", {}, Findings(*ends, 0.9, [ends[2]], [0.95] * 3, texts, None, None))
    monkeypatch.setattr(calibrated_model, "write_calibrated", lambda *_, **__: record)
    file = tmp_path / "text.jsonl"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    file.write_text(json.dumps({"text": "a"}))
    words = f"--model {tmp_path} --base {tmp_path} --save s --expanded-languages el".split()
    words += ["--data", f"en={file}", "--data", f"el={file}"]
    assert exit_code(calibrator.main, *words, *flags) == 0
    assert ("0.30 nats" in capsys.readouterr().err) == (distance > 0.2 and not flags)


def test_text_that_is_evaluated_on_finds_no_routers(tmp_path: Path) -> None:
    for name, texts in (("el", "abcd"), ("held_out", "ac")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    exclude = [f"{tmp_path}/held_out.jsonl"]
    texts = RoutingSettings(save=tmp_path / "out", max_tokens=100, exclude=exclude).read({"el": f"{tmp_path}/el.jsonl"})
    assert texts == {"el": ["b", "d"]}


def test_files_without_a_name_are_texts_named_like_them(tmp_path: Path) -> None:
    files = {"a": "a.jsonl.gz", "b": "b.jsonl", "el": "ell.jsonl"}
    for name in files.values():
        (tmp_path / name).touch()
    actual = named_texts([f"en={tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl*"], "--data")
    assert actual == {name: f"{tmp_path}/{file}" for name, file in ({"en": "b.jsonl"} | files).items()}
