"""The similarity of languages per layer, against loops over pairs of tokens and a model with known similarities."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from moelpr.errors import run_command
from moelpr.evaluate.layers import LayerSimilarity, choose, least_similar, mean_directions, similarities
from moelpr.evaluate.models import load_model
from moelpr.plan.__main__ import main


def loop_over_pairs(a_TH: torch.Tensor, b_TH: torch.Tensor) -> float:
    cosines = [sum(u * v) / (math.hypot(*u) * math.hypot(*v)) for u, v in product(a_TH, b_TH)]
    return float(sum(cosines) / len(cosines))


def test_similarities_are_means_over_all_pairs_of_tokens() -> None:
    torch.manual_seed(3)
    shapes = {"en": 5, "es": 4, "el": 3, "hu": 7, "tr": 2}
    inputs = {language: torch.randn(2, tokens, 6, dtype=torch.float64) + 0.5 for language, tokens in shapes.items()}
    directions = {
        language: (layers / layers.norm(dim=-1, keepdim=True)).mean(dim=1) for language, layers in inputs.items()
    }
    for number, found in enumerate(similarities(directions, ["en", "es"])):
        cosine = {(a, b): loop_over_pairs(inputs[a][number], inputs[b][number]) for a in shapes for b in shapes}
        expanded = (cosine["el", "hu"] + cosine["el", "tr"] + cosine["hu", "tr"]) / 3
        original = sum(cosine[pair] for pair in product(("el", "hu", "tr"), ("en", "es"))) / 6
        assert (found.expanded, found.original) == pytest.approx((expanded, original))
        assert found.mean == pytest.approx((expanded + original) / 2)
        assert expanded != pytest.approx(original)


def test_the_inputs_are_those_of_the_ffns_without_start_and_last_token(dense_dir, texts) -> None:
    loaded = load_model(dense_dir, device="cpu")
    directions, tokens = {}, {}
    for language, documents in texts.items():
        directions[language], tokens[language] = mean_directions(loaded, language, documents, 10_000)
    for number, found in enumerate(similarities(directions, ["en"])):
        inputs: dict[str, torch.Tensor] = {}
        for language, documents in texts.items():
            seen: list[torch.Tensor] = []
            ffn = loaded.model.model.layers[number].mlp
            hook = ffn.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
            with torch.no_grad():
                for text in documents:
                    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:64]
                    loaded.model(torch.tensor([[loaded.start_id, *ids[:-1]]]))
            hook.remove()
            inputs[language] = torch.cat([hidden[1:] for hidden in seen]).double()
            assert len(inputs[language]) == tokens[language]
        assert found.expanded == pytest.approx(loop_over_pairs(inputs["el"], inputs["zh"]), abs=1e-6)
        original = (loop_over_pairs(inputs["en"], inputs["el"]) + loop_over_pairs(inputs["en"], inputs["zh"])) / 2
        assert found.original == pytest.approx(original, abs=1e-6)


@pytest.fixture
def one_layer_differs(dense_dir, tmp_path: Path) -> Path:
    """A model whose FFNs see only what all tokens share, except in layer 1, which sees only the token's language.

    Attention and FFNs add nothing, so each layer's norm sees the embedding: dimension 0 is every token's, dimension 1
    that of "a", dimension 2 that of all others.
    """
    loaded = load_model(dense_dir, device="cpu")
    ids = loaded.tokenizer("a" * 20, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        embedding = loaded.model.get_input_embeddings().weight.zero_()
        embedding[:, 0] = embedding[:, 2] = 1
        embedding[ids, 1], embedding[ids, 2] = 1, 0
        for number, layer in enumerate(loaded.model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            weight = layer.post_attention_layernorm.weight.zero_()
            weight[slice(1, 3) if number == 1 else slice(0, 1)] = 1
    directory = Path(shutil.copytree(dense_dir, tmp_path / "model"))
    loaded.model.save_pretrained(directory)
    return directory


def write_texts(folder: Path, **texts: str) -> list[str]:
    """The values of --data."""
    for language, text in texts.items():
        (folder / f"{language}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return [f"{language}={folder}/{language}.jsonl" for language in texts]


@pytest.fixture
def plan_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `python -m moelpr.plan layers` and return stdout."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["plan", "layers", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


def test_the_layer_in_which_languages_differ_gets_experts(one_layer_differs, plan_layers, tmp_path: Path) -> None:
    data = write_texts(tmp_path, el="a" * 60, en="b" * 40)
    command = ("--hf-path", one_layer_differs, "--data", *data, "--share", "0.34", "--original-languages", "en")
    found = json.loads(plan_layers(*command, "--json"))
    assert [layer["mean"] for layer in found["layers"]] == pytest.approx([1, 0, 1])
    assert [layer["expanded"] for layer in found["layers"]] == [None] * 3
    assert (found["chosen"], found["flags"]) == ([1], ["--moe-layers", "1"])
    assert found["original_languages"] == ["en"]
    shown = plan_layers(*command).splitlines()
    assert shown[-1] == "  --moe-layers 1"
    assert [line.split("|")[5].strip() for line in shown if line.startswith(("| 0", "| 1", "| 2"))] == ["", "x", ""]


def test_no_more_tokens_are_read_than_asked_for(dense_dir) -> None:
    loaded = load_model(dense_dir, device="cpu")
    read: list[str] = []

    def texts():
        for number in range(20):
            read.append("xyz" * 50)
            yield read[number]

    choice = choose(loaded, {"el": texts(), "hu": ["qrs" * 50]}, [], num_tokens=100, share=0.5)
    assert len(read) == 2  # 64 tokens of the first, the model's longest input, and 36 of the second
    assert choice.tokens["el"] == 98  # without the last of each document
    assert all(layer.original is None for layer in choice.layers)


def test_the_share_is_rounded_to_layers_and_at_least_one() -> None:
    layers = [LayerSimilarity(value, None) for value in (0.3, 0.1, 0.5, 0.2, 0.4, 0.6)]
    assert least_similar(layers, 1 / 3) == [1, 3]
    assert least_similar(layers, 0.33) == [1, 3]
    assert least_similar(layers, 0.01) == [1]
    assert least_similar(layers, 1) == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "el={el}"], "at least two languages"),
        (["--data", "el={el}", "en={en}", "--original-languages", "el,en"], "one of them not in --original-languages"),
        (["--data", "el={el}", "en={en}", "--original-languages", "eng"], "--original-languages eng must be among"),
        (["--data", "el={el}", "{en}"], "--data must be LANG=FILE"),
        (["--data", "el={el}", "el={en}"], "--data has el twice"),
        (["--data", "el={el}", "en={empty}"], "contains no documents"),
        (["--data", "el={el}", "en={short}"], "no en document has more than one token"),
        (["--data", "el={el}", "en=nowhere"], "cannot read nowhere"),
        (["--share", "0"], "--share: must be above 0 and at most 1, got 0"),
        (["--tokens", "0"], "--tokens: must be"),
        (["--hf-path", "{moe}"], "is an MoE"),
        (["--hf-path", "{llama}"], "MixtralForCausalLM, which has experts in every layer"),
        (["--hf-path", "{gpt2}"], "got GPT2LMHeadModel"),
        (["--hf-path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments, named, plan_layers, dense_dir, moe_dir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_texts(tmp_path, el="a" * 30, en="b" * 30, short="b")
    (tmp_path / "empty.jsonl").touch()
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("el", "en", "short", "empty")} | {"moe": moe_dir}
    for name, architecture in (("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")):
        paths[name] = tmp_path / name
        paths[name].mkdir()
        config = json.loads((dense_dir / "config.json").read_text())
        changed = config | {"architectures": [architecture], "model_type": name}
        (paths[name] / "config.json").write_text(json.dumps(changed))
    arguments = [argument.format(**paths) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: plan_layers("--hf-path", dense_dir, "--data", *data[:2], *arguments) and None)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in error and error.count("\n") == 1
