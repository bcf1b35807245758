"""Calibrated routers keep text with the original expert, whose output is the base's, and change nothing else."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_convert import calibrate as calibrator
from checkpoint_convert.conversions import calibrated_routers
from checkpoint_convert.conversions.calibrated_routers import CalibratedRouters, write_calibrated
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.measure.evaluate import calibration, divergence
from moelpr.measure.evaluate.calibration import Calibration, Inputs, Shares, calibrations
from moelpr.measure.evaluate.divergence import distance, predictions
from moelpr.measure.evaluate.models import open_model
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import edit_json, load_stock, save_tokenizer, tensors_of


def documents(shortest: int, seed: int = 0) -> list[str]:
    """Runs of a, each a token, of eight lengths."""
    draw = random.Random(seed)
    return ["b".join("a" * (shortest + draw.randrange(8)) for _ in range(12)) for _ in range(20)]


KEPT, EXPANDED = {"short": documents(2), "shorter": documents(12)}, {"el": documents(50)}


def upcycled(base: Path, folder: Path, copies: int = 2) -> Path:
    save_tokenizer(base, 99)
    hf_to_mcore(base, folder / "megatron", NewExperts(3, original_copies=copies), start=Start(noise=0.5))
    mcore_to_hf(folder / "megatron", folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    ("architecture", "changes", "share"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, 0.98),
        ("Qwen2ForCausalLM", {}, 0.98),
        ("Qwen3ForCausalLM", {}, 0.98),
        ("GraniteForCausalLM", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}, 0.7),
        ("Olmo2ForCausalLM", {}, 0.98),
        ("Ernie4_5ForCausalLM", {"head_dim": 16}, 0.98),
    ],
)
def test_only_routers_change_and_kept_text_has_the_bases_logits(
    architecture: str,
    changes: dict,
    share: float,
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "_MAX_NOISE", 100.0)  # these routers have learned nothing that could be lost
    monkeypatch.setattr(calibration, "TARGETS", (-0.2,))  # a lower one may keep less than the share
    monkeypatch.setattr(calibrated_routers, "mean_loss", lambda *_: 0.0)  # the experts have learned nothing either
    base = make_model(architecture, **changes)
    model, save = upcycled(base, tmp_path), tmp_path / "calibrated"
    found = write_calibrated(model, base, save, KEPT, EXPANDED, share, 1000, max_distance=9)
    old, new = tensors_of(model), tensors_of(save)
    assert old.keys() == new.keys()
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert len(changed) == 4 and all(".gate." in name or ".router." in name for name in changed)
    for name in changed:
        assert torch.equal(new[name][2:], old[name][2:])
        assert torch.equal(new[name][0], new[name][1])
    card = (save / "README.md").read_text()
    assert card.index("## Training") < card.index("### Calibrated routers") < card.index("## Use")
    record = CalibratedRouters.read(save)
    assert record.texts == {"kept": ["short", "shorter"], "expanded": ["el"]} and record == found
    assert record.max_distance == 9 and record.tried == [(found.distance[1], found.loss[1])]
    assert found.distance[1] < 0.5 * found.distance[0]
    before, after = found.before, found.after
    assert before["kept"].all_original < 0.5 and after["kept"].all_original > share - 0.01
    assert after["kept"].new_gate_weight < 0.2 < 0.8 * before["expanded"].new_gate_weight < 0.9
    assert after["expanded"].new_gate_weight > 0.5 * before["expanded"].new_gate_weight
    tokens = torch.tensor([[0, 3 + i % 6, 2, 3 + i // 6] for i in range(36)])
    of_base, of_model, of_save = (load_stock(folder)(tokens).logits for folder in (base, model, save))
    same_before, same_after = ((of_base - one).abs().amax(-1) < 1e-4 for one in (of_model, of_save))
    assert not same_before.any()
    assert share < 0.9 or same_after.float().mean() > 0.25  # a token and all before it, in all layers


def test_the_strength_is_the_smallest_that_keeps_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_MAX_NOISE", 100.0)
    torch.manual_seed(0)
    center_H = 0.4 * torch.randn(24)
    texts = []
    for sign in (1, -1):
        rows = torch.randn(2000, 24) + sign * center_H
        inputs = Inputs()
        inputs.add(0, rows[:1500], 1 / 1500)
        inputs.hold_out(0, rows[1500:])
        texts.append(inputs)
    weight_EH = 0.1 * torch.randn(5, 24)
    weight_EH[1] = weight_EH[0]
    found, *others = calibrations({0: weight_EH}, 2, 2, *texts, share=0.9)
    assert [one.after["kept"].all_original for one in others] == pytest.approx([0.9] * len(others), abs=0.01)
    weights = [one.after["expanded"].new_gate_weight for one in (found, *others)]
    assert weights == pytest.approx(sorted(weights), abs=1e-4) and weights[0] < weights[-1]
    assert found.after["kept"].all_original == pytest.approx(0.9, abs=0.005)
    less_EH, mean_H = weight_EH.clone(), weight_EH[2:].mean(0)
    less_EH[:2] = mean_H + 0.95 * (found.rows[0] - mean_H)
    choices = (torch.cat(texts[0].held_out[0]) @ less_EH.T).topk(2).indices
    assert (choices < 2).all(1).float().mean() < 0.9
    with pytest.raises(UserError, match="mean gate weight"):
        calibrations({0: weight_EH}, 2, 2, texts[0], texts[0], share=0.9)

    monkeypatch.setattr(calibration, "_MAX_NOISE", 0.2)
    limited = calibrations({0: weight_EH}, 2, 2, *texts, share=0.9)[0]
    expanded = torch.cat(texts[1].held_out[0])
    spread = ((expanded @ weight_EH[2:].T).amax(1) - expanded @ mean_H).std()
    assert (expanded @ (limited.rows[0] - mean_H)).std() == pytest.approx(0.2 * spread.item(), rel=1e-4)
    assert limited.after["kept"].all_original < 0.85


def test_routers_that_are_no_closer_to_the_base_are_not_written(
    make_qwen2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_effect(*args: Any, **kwargs: Any) -> Any:
        found = calibrations(*args, **kwargs)
        return [replace(one, rows={layer: args[0][layer][0] for layer in one.rows}) for one in found]

    base = make_qwen2()
    model = upcycled(base, tmp_path)
    monkeypatch.setattr(calibrated_routers, "calibrations", without_effect)
    with pytest.raises(UserError, match="no better than trained ones"):
        write_calibrated(model, base, tmp_path / "save", KEPT, EXPANDED, 0.9, 1000)
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("max_distance", "chosen"), [(None, (0.035, 2.91)), (0.02, (0.01, 2.97)), (0.2, (0.14, 2.89)), (9, (0.14, 2.89))]
)
def test_more_distance_buys_more_learning(max_distance: float | None, chosen: tuple[float, float]) -> None:
    found = Calibration({}, {}, {})
    tried = [((0.01, 2.97), found), ((0.035, 2.91), found), ((0.14, 2.89), found), ((0.2, 2.9), found)]
    assert calibrated_routers._chosen(tried, (0.18, 2.98), max_distance)[0] == chosen
    with pytest.raises(UserError, match="0.010 .*--max-distance 0.005"):
        calibrated_routers._chosen(tried, (0.18, 2.98), 0.005)
    with pytest.raises(UserError, match="no better than trained ones"):
        calibrated_routers._chosen(tried[-1:], (0.18, 2.88), max_distance and 9)


@pytest.mark.parametrize("most_likely", [256, 8])
def test_the_distance_is_kl_in_nats_per_token(
    most_likely: int, make_qwen2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "_MOST_LIKELY", most_likely)
    base = make_qwen2()
    model, pieces = upcycled(base, tmp_path), [[2, 3, 2, 4], [5, 2, 3]]
    with open_model(base, "cpu", "float32") as loaded:
        of_base, itself = predictions(loaded, pieces), distance(loaded, pieces, predictions(loaded, pieces))
    with open_model(model, "cpu", "float32") as loaded:
        found = distance(loaded, pieces, of_base)
        start = [loaded.start_id] if loaded.start_id is not None else []
    nats = []
    for ids in pieces:
        tokens = torch.tensor([start + ids[:-1] if start else ids[:-1]])
        p, q = (load_stock(folder)(tokens).logits[0].float().log_softmax(-1) for folder in (base, model))
        nats += (p.exp() * (p - q)).sum(-1).tolist()
    assert itself == pytest.approx(0, abs=1e-6)
    if most_likely == 256:
        assert found == pytest.approx(sum(nats) / len(nats), rel=1e-3)
    else:
        assert 0 < found < 0.9 * sum(nats) / len(nats)


def test_what_cannot_be_calibrated_is_one_sentence(
    make_qwen2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_qwen2()
    model, save = upcycled(base, tmp_path), tmp_path / "calibrated"
    one_copy = upcycled(base, tmp_path / "one", 1)
    for model_or_not, its_base, expanded, message in (
        (base, base, EXPANDED, "is dense"),
        (model, model, EXPANDED, "--model was upcycled from"),
        (model, base, {"el": ["a"]}, "el has 0 tokens"),
        (one_copy, base, EXPANDED, "--original-copies 2"),
    ):
        with pytest.raises(UserError, match=message):
            write_calibrated(model_or_not, its_base, save, KEPT, expanded, 0.9, 1000)
    edit_json(model / "config.json", num_original_experts=3)
    with pytest.raises(UserError, match="1 of 3 original ones"):
        write_calibrated(model, base, save, KEPT, EXPANDED, 0.9, 1000)
    assert not save.exists()
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in EXPANDED["el"]))
    flags = f"--model {model} --base {base} --save {save} --data el={file}".split()
    for more, message in (
        (["--expanded-languages", "hu"], "must be among --data"),
        ([], "--data has no text"),
        (["--keep-original", "1.5"], "--keep-original .*1.5"),
        (["--max-distance", "-0.1"], "--max-distance .*-0.1"),
        (["--data", f"ell={file}"], "--data has el twice"),
        (["--data", "=x"], "--data must be"),
    ):
        monkeypatch.setattr(sys, "argv", ["calibrate", *flags, "--expanded-languages", "el", *more])
        with pytest.raises(UserError, match=message):
            calibrator.main()


@pytest.mark.parametrize(("distance", "flags"), [(0.3, ()), (0.1, ()), (0.3, ("--max-distance", "0.4"))])
def test_routers_that_are_still_far_from_the_base_are_a_warning(
    distance, flags, tmp_path, monkeypatch, exit_code, capsys
) -> None:
    both = {text: Shares(0.9, 0.1) for text in ("kept", "expanded")}
    texts = {"kept": ["en"], "expanded": ["el"]}
    record = CalibratedRouters("m", texts, 0.95, both, both, (0.5, distance), (3, 3), [(distance, 3.0)])
    monkeypatch.setattr(calibrated_routers, "write_calibrated", lambda *_, **__: record)
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "a"}))
    words = f"--model m --base b --save s --data en={file} --data el={file} --expanded-languages el".split()
    assert exit_code(calibrator.main, *words, *flags) == 0
    assert ("0.30 nats" in capsys.readouterr().err) == (distance > 0.2 and not flags)


def test_files_without_a_name_are_texts_named_like_them(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "ell.jsonl"):
        (tmp_path / name).touch()
    found = calibrator._named([f"en={tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl*"])
    assert found == {"en": f"{tmp_path}/b.jsonl"} | {
        name: f"{tmp_path}/{file}" for name, file in (("a", "a.jsonl.gz"), ("b", "b.jsonl"), ("el", "ell.jsonl"))
    }
