"""A combined model is the base where its routers choose the base's FFN, and its experts where they choose these."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoTokenizer

from checkpoint_convert import combine as combiner
from checkpoint_convert.common.settings import CombineSettings
from checkpoint_convert.conversions.combined_model import AdapterReader, Expert, combine, languages_by_name
from checkpoint_convert.conversions.routed_model import RoutedModel
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.measure.evaluate import calibration
from moelpr.measure.report import findings
from tests.support.experts import EXPANDED, KEPT, documents, trained, with_tokenizer
from tests.support.hf_models import (
    assert_logits,
    assert_same,
    edit_json,
    edit_tensors,
    load_stock,
    save_tokenizer,
    stock_logits,
    tensors_of,
)

GREEK = {"el": EXPANDED["el"]}


@pytest.fixture
def base(make_qwen2: Callable[..., Path], tmp_path: Path) -> Path:
    return with_tokenizer(Path(shutil.copytree(make_qwen2(), tmp_path / "base")))


@pytest.fixture
def greek(base: Path, tmp_path: Path) -> Path:
    return trained(base, tmp_path / "greek", GREEK["el"])


def combined(base: Path, experts: dict[Path, list[str]], save: Path, **options) -> RoutedModel:
    expanded = {name: EXPANDED[name] for names in experts.values() for name in names}
    return combine(base, experts, KEPT, expanded, settings(save, **options))


def settings(save: Path, **options) -> CombineSettings:
    return CombineSettings(save=save, max_tokens=1000, device="cpu", **options)


def held_out(base: Path, texts: list[str]) -> torch.Tensor:
    """The tokens of every fifth document, after the one that starts it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return torch.tensor([[0, *tokenizer(text).input_ids] for text in texts[4::5]])


def loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("architecture", "stock", "changes"),
    [
        ("LlamaForCausalLM", "MixtralForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", {}),
        ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", {}),
        ("GraniteForCausalLM", "GraniteMoeForCausalLM", {"residual_multiplier": 0.5}),
        ("Olmo2ForCausalLM", "FlexOlmoForCausalLM", {}),
        ("Phi3ForCausalLM", "MixtralForCausalLM", {"pad_token_id": 0}),
    ],
)
def test_the_stock_model_is_as_near_to_base_and_expert_as_recorded(
    architecture: str, stock: str, changes: dict, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = with_tokenizer(Path(shutil.copytree(make_model(architecture, **changes), tmp_path / "base")))
    expert = trained(base, tmp_path / "greek", GREEK["el"])
    record = combined(base, {expert: ["el"]}, tmp_path / "save")
    assert record == RoutedModel.read(tmp_path / "save") and record.experts == {"greek": ["el"]}
    model = load_stock(tmp_path / "save", stock)
    assert (model.config.num_original_experts, model.config.num_experts_per_tok) == (1, 1)
    stock_models = load_stock(base), load_stock(expert), model
    tokens = held_out(base, GREEK["el"])
    with torch.no_grad():
        losses = [loss(one(tokens).logits, tokens) for one in stock_models]
    assert losses == pytest.approx(record.findings.texts["el"].losses, rel=1e-4)
    for name, texts in KEPT.items():
        tokens = held_out(base, texts)
        with torch.no_grad():
            old, _, new = (one(tokens).logits[:, :-1].double().log_softmax(-1) for one in stock_models)
            before, _, after = (loss(one(tokens).logits, tokens) for one in stock_models)
        nats = (old.exp() * (old - new)).sum(-1).mean().item()
        assert nats == pytest.approx(record.findings.texts[name].distance, rel=1e-3, abs=1e-6)
        assert after / before - 1 == pytest.approx(record.findings.texts[name].change, abs=1e-4)
    its = record.findings
    sums = [point.distance + point.loss for point in (its.base, its.learned, its.result)]
    assert min(sums) == sums[2] and its.kept > 0.7 and its.result.distance < 0.3 * its.learned.distance
    assert record.findings.texts["first"].all_original > 0.6 and record.findings.texts["el"].shares[1] > 0.8


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoe"])
def test_another_stock_class_computes_the_same_and_takes_more_experts(base: Path, greek: Path, tmp_path, name) -> None:
    hungarian = trained(base, tmp_path / "hungarian", EXPANDED["hu"])
    combined(base, {greek: ["el"]}, tmp_path / "usual")
    combined(base, {greek: ["el"]}, tmp_path / "other", as_class=name)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["model_type"] == name
    assert_logits(stock_logits(tmp_path / "other"), tmp_path / "usual")
    more = settings(tmp_path / "more", as_class=name, onto=tmp_path / "other", unchecked=True)
    record = combine(base, {hungarian: ["hu"]}, KEPT | GREEK, {"hu": EXPANDED["hu"]}, more)
    assert [*record.onto] == ["greek"] and load_stock(more.save).config.model_type == name
    with pytest.raises(UserError, match="cannot be written as MixtralForCausalLM"):
        combined(base, {greek: ["el"]}, tmp_path / "refused", as_class="mixtral")
    assert not (tmp_path / "refused").exists()


def test_the_base_combined_with_itself_is_the_base_or_refused_if_it_learned_nothing(base: Path, tmp_path) -> None:
    """Also if training in bf16 rounded what it did not train, and wrote it in fp32 again."""
    itself = Path(shutil.copytree(base, tmp_path / "itself"))
    rounded = {name: one if ".mlp." in name else one.bfloat16().to(one) for name, one in tensors_of(base).items()}
    save_file(rounded, itself / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has the FFNs of"):
        combined(base, {itself: ["el"]}, tmp_path / "save")
    assert not (tmp_path / "save").exists()
    edit_tensors(itself, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"][0, 0].add_(1e-6))
    record = combined(base, {itself: ["el"]}, tmp_path / "save")
    assert_logits(stock_logits(tmp_path / "save"), base)
    assert record.findings.result.distance == pytest.approx(0, abs=1e-6)


def test_experts_of_two_languages_are_told_apart_and_one_expert_may_have_both(base, greek, tmp_path) -> None:
    hungarian = trained(base, tmp_path / "hungarian", EXPANDED["hu"])
    both = trained(base, tmp_path / "both", EXPANDED["el"] + EXPANDED["hu"])
    apart = combined(base, {greek: ["el"], hungarian: ["hu"]}, tmp_path / "apart")
    assert apart.findings.texts["el"].shares[1] > 0.8 and apart.findings.texts["hu"].shares[2] > 0.8
    assert apart.experts == {"greek": ["el"], "hungarian": ["hu"]} and apart.findings.kept > 0.7
    joint = combined(base, {both: ["el", "hu"]}, tmp_path / "joint")
    assert len(joint.findings.texts["hu"].shares) == 2 and joint.findings.kept > 0.7
    names = tensors_of(tmp_path / "apart")
    for number, folder in enumerate((base, greek, hungarian)):
        ours, theirs = (f"model.layers.3.mlp{of}.up_proj.weight" for of in (f".experts.{number}", ""))
        assert torch.equal(names[ours], tensors_of(folder)[theirs])


def test_routes_of_a_combined_model_stay_when_an_expert_is_added(base: Path, greek: Path, tmp_path: Path) -> None:
    """As many tokens as the dial says go where they went, so the model is the one before, bit for bit."""
    combined(base, {greek: ["el"]}, first := tmp_path / "first")
    hungarian = trained(base, tmp_path / "hungarian", EXPANDED["hu"])
    both = settings(tmp_path / "both", onto=first)
    expanded, kept = {"hu": EXPANDED["hu"]}, KEPT | {"el": EXPANDED["el"]}
    record = combine(base, {hungarian: ["hu"]}, kept, expanded, both)
    assert (record.onto, record.experts) == ({"greek": ["el"]}, {"hungarian": ["hu"]}) and record.findings.kept > 0.7
    expert = Expert(hungarian, ["hu", "tr"], AdapterReader.__new__(AdapterReader))
    assert languages_by_name([expert], ["hungarian"]) == {"hungarian (hu, tr)": ["hu", "tr"]}
    before, after = tensors_of(first), tensors_of(both.save)
    for name in before:
        same = after[name][:2] if name.endswith("mlp.gate.weight") else after[name]
        assert torch.equal(same, before[name]), name
    models = load_stock(first), load_stock(both.save)
    choices: list[torch.Tensor] = []
    num_same = 0
    for layer in models[1].model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, _: choices.append((args[0] @ gate.weight.T).argmax(-1)))
    for name in ("first", "second", "el"):
        choices.clear()
        tokens = held_out(base, kept[name])
        with torch.no_grad():
            old, new = (one(tokens).logits for one in models)
        is_old = torch.stack([choice.view(tokens.shape) < 2 for choice in choices]).all(0)
        assert is_old.float().mean().item() == pytest.approx(record.findings.texts[name].all_original, abs=0.02)
        is_before = is_old.cumprod(1).bool()  # nor does attention read what a new expert has written
        num_same += int(is_before[:, 1:].sum())
        torch.testing.assert_close(new[is_before], old[is_before], rtol=1e-5, atol=1e-5)
    assert num_same > 10
    tokens = held_out(base, EXPANDED["hu"])
    with torch.no_grad():
        old, new = (loss(one(tokens).logits, tokens) for one in models)
    assert new == pytest.approx(record.findings.texts["hu"].losses[2], rel=1e-4) and new < old - 1
    combine(
        base,
        {hungarian: ["fr"]},
        kept | {"hu": EXPANDED["hu"]},
        {"fr": documents("Z")},
        third := settings(tmp_path / "third", max_distance=9.0, onto=both.save, unchecked=True),
    )
    assert RoutedModel.read(third.save).onto == {"greek": ["el"], "hungarian": ["hu"]}
    edit_tensors(
        changed := Path(shutil.copytree(first, tmp_path / "changed")), lambda its: its["model.norm.weight"].add_(1)
    )
    for model, texts, message in (
        (first, KEPT, "knows el"),
        (base, kept, "no model of moelpr model combine"),
        (changed, kept, "another model.norm.weight"),
    ):
        with pytest.raises(UserError, match=message):
            combine(base, {hungarian: ["hu"]}, texts, expanded, settings(tmp_path / "x", onto=model))


def test_checkpoints_and_adapters_are_experts_too(base: Path, greek: Path, tmp_path: Path) -> None:
    hf_to_mcore(greek, tmp_path / "checkpoint", None)
    adapter, name = tmp_path / "adapter", "model.layers.2.mlp.down_proj"
    adapter.mkdir()
    torch.manual_seed(0)
    a, b = torch.randn(3, 48), 0.01 * torch.randn(32, 3)
    factors = {f"base_model.model.{name}.lora_{x}.weight": its for x, its in (("A", a), ("B", b))}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "rank_pattern": {}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for expert in (greek, tmp_path / "checkpoint"):
        combined(base, {expert: ["el"]}, tmp_path / f"of-{expert.name}")
    assert_same(tensors_of(tmp_path / "of-greek"), tensors_of(tmp_path / "of-checkpoint"))
    combined(base, {adapter: ["el"]}, tmp_path / "of-adapter", max_distance=9.0)
    expert = tensors_of(tmp_path / "of-adapter")["model.layers.2.mlp.experts.1.down_proj.weight"]
    torch.testing.assert_close(expert, tensors_of(base)[f"{name}.weight"] + 4 * b @ a)
    for change in ({"use_dora": True}, {"rank_pattern": {"up_proj": 4}}, {"peft_type": "IA3"}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match="plain LoRA"):
            combined(base, {adapter: ["el"]}, tmp_path / "refused")


def test_what_else_an_expert_changed_is_named_or_dropped(base: Path, tmp_path: Path) -> None:
    everything = trained(base, tmp_path / "everything", GREEK["el"], names="", steps=20)
    with pytest.raises(UserError, match=r"outside its FFNs, most in .* \(by .*--ignore-others"):
        combined(base, {everything: ["el"]}, tmp_path / "save")
    record = combined(base, {everything: ["el"]}, tmp_path / "save", ignore_others=True, max_distance=9.0)
    whole, ffns = record.ignored["everything"]
    assert whole < ffns == pytest.approx(record.findings.learned.loss)
    assert torch.equal(tensors_of(tmp_path / "save")["lm_head.weight"], tensors_of(base)["lm_head.weight"])


def test_the_dials_buy_distance_or_learning(base: Path, greek: Path, tmp_path: Path) -> None:
    near = combined(base, {greek: ["el"]}, tmp_path / "near", max_distance=0.02)
    much = combined(base, {greek: ["el"]}, tmp_path / "much", keep=0.9)
    assert near.findings.result.distance <= 0.02 and much.findings.kept >= 0.9
    with pytest.raises(UserError, match="--keep 1"):
        combined(base, {greek: ["el"]}, tmp_path / "refused", keep=1.0)
    assert not (tmp_path / "refused").exists()


def test_what_cannot_be_combined_is_one_sentence(base: Path, greek: Path, make_qwen2, tmp_path: Path) -> None:
    def other(name: str, **changes) -> Path:
        return with_tokenizer(Path(shutil.copytree(make_qwen2(**changes), tmp_path / name)))

    tokenizer = Path(shutil.copytree(greek, tmp_path / "tokenizer"))
    save_tokenizer(tokenizer, 60)
    quantized = Path(shutil.copytree(greek, tmp_path / "quantized"))
    edit_json(quantized / "config.json", quantization_config={"bits": 4})
    attention = Path(shutil.copytree(greek, tmp_path / "attention"))
    edit_tensors(attention, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.5))
    foreign = Path(shutil.copytree(greek, tmp_path / "foreign"))
    edit_tensors(foreign, lambda tensors: tensors.update(foreign=torch.ones(3)))
    for expert, message in (
        (foreign, "contains the tensor foreign"),
        (other("wider", intermediate_size=40), r"ffn_hidden_size is \d+ and 40"),
        (other("vocabulary", vocab_size=105), r"vocab_size is \d+ and 105"),
        (tokenizer, "tokenizers of"),
        (quantized, "is quantized"),
        (attention, r"1 of \d+ tensors .* model.layers.1.self_attn.q_proj.weight \(by 50.00%\)"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            combined(base, {expert: ["el"]}, tmp_path / "save")
        assert "\n" not in str(caught.value) and not (tmp_path / "save").exists()
    mixed = KEPT | {"greek": documents("A", seed=1)}
    with pytest.raises(UserError, match=r"cannot be told from expanded text: greek \(\d+% of its tokens\)"):
        combine(base, {greek: ["el"]}, mixed, GREEK, settings(tmp_path / "save"))
    assert not (tmp_path / "save").exists()
    record = combine(base, {greek: ["el"]}, mixed, GREEK, settings(tmp_path / "save", unchecked=True))
    assert record.findings.texts["greek"].distance > record.findings.texts["first"].distance


def test_a_text_of_many_that_the_base_reads_like_expanded_text_is_left_out(base, greek, tmp_path, capsys) -> None:
    others = {f"text {seed}": documents("ai"[seed % 2], seed) for seed in range(9)}
    combine(base, {greek: ["el"]}, others, GREEK, settings(tmp_path / "others"))
    record = combine(base, {greek: ["el"]}, others | {"greek": documents("A", 1)}, GREEK, settings(tmp_path / "both"))
    assert "greek" not in record.findings.texts
    assert re.search(
        r"warning: left out, as the base reads it like expanded text: greek \(\d+% ", capsys.readouterr().err
    )
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("others", "both"))
    assert first == second


def test_the_command_reads_files_and_says_what_was_kept(base, greek, tmp_path, exit_code, refused, monkeypatch, capsys):
    for name, texts in (KEPT | GREEK).items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = f"{base} --text el={tmp_path}/el.jsonl --keep-text {tmp_path}/*d.jsonl {tmp_path}/first.jsonl".split()
    words += f"--save {tmp_path}/save --device cpu --max-tokens 1000".split()
    expert = ["--expert", f"el={greek}"]
    for more, message in (
        (["--expert", f"={greek}"], "--expert"),
        (["--expert", f"greek={greek}"], "did you mean el?"),
        (["--expert", f"hu={greek}"], "--text"),
        ([*expert, "--keep-text", f"el={tmp_path}/el.jsonl"], "--keep-text el"),
        ([*expert, "--keep-text", f"x={tmp_path}/el.jsonl"], "--keep-text x is in an expanded language; remove it, or"),
        ([*expert, "--keep", "2"], "--keep"),
        ([*expert, "--keep", "0.9", "--max-distance", "1"], "--keep"),
    ):
        assert message in refused(combiner.main, *words, *more) and not (tmp_path / "save").exists()
    monkeypatch.setattr(findings, "LEAST_KEPT", 1.1)  # more than there is
    assert exit_code(combiner.main, *words, *expert, "--base-model", "owner/name") == 0
    printed, record = capsys.readouterr().out, RoutedModel.read(tmp_path / "save")
    assert f"kept {record.findings.kept:.1%}" in printed and "second" in printed
    assert f"\nHardly worth serving: it {record.findings.shortcomings}; " in printed
    card = (tmp_path / "save" / "README.md").read_text()
    assert "base_model: owner/name\n" in card and "# owner/name with 1 more" in card
    assert "language:\n- el\n" in card and f"{record.findings.kept:.1%} of what was learned" in card


@pytest.mark.parametrize("dial", [{}, {"max_distance": 0.05}, {"keep": 0.5}])
def test_the_search_ends_at_shares_without_a_better_neighbor(dial: dict) -> None:
    ends = calibration.Point(0.0, 3.0), calibration.Point(0.5, 2.0)

    def measured(parts: tuple[int, ...]) -> calibration.Point:
        costs = (cost * (5 - part) ** 2 / 200 for cost, part in zip((2.0, 1.0, 3.0), parts, strict=True))
        return calibration.Point(sum(costs), 2.1 + sum(parts) / 30)

    def score(point: calibration.Point) -> tuple[float, float]:
        return calibration._score(ends, settings(Path("save"), **dial), point)

    parts = calibration._search(measured, (2, 2, 2), score)
    point = measured(parts)
    for place, step in product(range(3), (-1, 1)):
        other = [*parts]
        other[place] += step
        if 0 <= other[place] < len(calibration.SHARES):
            assert score(measured(tuple(other))) >= score(point)
    assert dial or score(calibration.Point(0.09, 2.1)) < score(calibration.Point(0.11, 2.0))  # the goal is 0.1 nats
