"""`moelpr evaluate` from its arguments to its files and exit codes."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moelpr.base.languages import language_name
from moelpr.measure.evaluate.compare import choose_prompts
from moelpr.measure.evaluate.models import load_model
from moelpr.measure.evaluate.scoring import Settings
from moelpr.measure.evaluate.text_results import TextResults


def test_text_prints_tables_and_writes_json_markdown_and_html(
    score, evaluate, capsys, tmp_path, data, dense_dir, moe_dir, texts
):
    output = tmp_path / "results"
    settings = ("--original-languages", "en,zh", "--sequence-length", 16, "--max-documents", 2)
    evaluate("--model", f"base={dense_dir}", "--model", moe_dir, *data, *settings, "--output", output)
    expected = score(load_model(dense_dir, "cpu"), {name: text[:2] for name, text in texts.items()}, Settings(16))
    content = json.loads((output / "results.json").read_text())
    assert content["settings"]["sequence_length"] == 16
    assert content["continuations"] == {}
    base, moe = content["models"]["base"], content["models"]["moe"]
    for language, actual in base["languages"].items():
        for metric in ("bits_per_byte", "perplexity", "accuracy", "bytes_per_token"):
            assert actual[metric]["value"] == pytest.approx(expected[language].metrics[metric])
            assert actual[metric]["low"] <= actual[metric]["value"] <= actual[metric]["high"]
        assert (actual["documents"], actual["change"]) == (2, {}) and "original_first_share" not in actual
        ours = moe["languages"][language]
        assert len(ours["original_first_share"]) == len(ours["layers"]) == 2
        change = ours["bits_per_byte"]["value"] / actual["bits_per_byte"]["value"] - 1
        assert ours["change"]["bits_per_byte"]["value"] == pytest.approx(change)
    bits = {language: result.metrics["bits_per_byte"] for language, result in expected.items()}
    means = [(bits["en"] + bits["zh"]) / 2, bits["el"]]
    assert [mean["bits_per_byte"]["value"] for mean in base["means"].values()] == pytest.approx(means)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("el "))
    markdown, page = (output / "results.md").read_text(), (output / "results.html").read_text()
    assert row.split()[1] == f"{bits['el']:.3f}" and row.split()[1] in markdown and row.split()[1] in page
    assert "](change.svg)" in markdown and (output / "change.svg").read_text().startswith("<svg")
    assert "<svg" in page and not re.search(r"<script|src=|href=\"[^#]|url\([^#]", page)


def test_continuations_are_written_for_every_language_and_model(evaluate, tmp_path, data, dense_dir, moe_dir, texts):
    output = tmp_path / "out"
    evaluate("--model", dense_dir, "--model", moe_dir, *data, "--continuations", 4, "--output", output)
    content = json.loads((output / "results.json").read_text())
    assert content["settings"]["continuation_tokens"] == 4
    page = (output / "results.html").read_text()
    for language, documents in texts.items():
        actual = content["continuations"][language]
        assert (actual["prompt"], actual["reference"]) == choose_prompts(documents, 1)[0]
        assert list(actual["by_model"]) == ["dense", "moe"]
        assert actual["prompt"] in page
        rates = content["wrong_language"][language]
        assert list(rates) == ["dense", "moe", "the text itself"]
        assert all(rate["decided"] + rate["undecided"] == len(choose_prompts(documents, 20)) for rate in rates.values())
    assert "Continued in another language" in page
    evaluate("text", "--model", dense_dir, *data, "--continuations", 4, "--language-id", "none", "--output", output)
    assert json.loads((output / "results.json").read_text())["wrong_language"] == {}


def test_routing_lists_the_layers_that_break_the_prior(
    score, evaluate, capsys, tmp_path, data, dense_dir, moe_dir, texts
):
    output = tmp_path / "out"
    models = ("--model", dense_dir, "--model", moe_dir)
    evaluate("routing", *models, *data, "--original-languages", "en", "--output", output)
    content = json.loads((output / "routing.json").read_text())["models"]
    assert list(content) == ["moe"]
    broken = {(prior["language"], prior["layer"]) for prior in content["moe"]["broken_priors"]}
    expected = set()
    for language, result in score(load_model(moe_dir, "cpu"), texts).items():
        for layer, share in zip(result.routing.layers, result.routing.original_first_share, strict=True):
            if (share < 0.5) if language == "en" else (share > 0.5):
                expected.add((language, layer))
    assert broken == expected != set()
    printed, page = capsys.readouterr().out, (output / "routing.html").read_text()
    for language, layer in broken:
        assert re.search(rf"moe: {language_name(language)} .*\b{layer} \(", printed)
    assert page.count("<svg xmlns") == 7 and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    evaluate("routing", "--model", f"a/b={moe_dir}", "--model", f"a_b={moe_dir}", *data, "--output", output)
    assert len({path.name for path in output.glob("routing-a_b*-experts.svg")}) == 2
    figures = ("original-first-share", "original-chosen-share", "load-imbalance", "entropy", "experts")
    assert all((output / f"routing-moe-{figure}.svg").is_file() for figure in figures)


def test_a_model_that_has_diverged_leaves_the_results_of_the_others(
    evaluate, tmp_path, monkeypatch, data, dense_dir, moe_dir
):
    """Its perplexity exceeds the largest number; a layer with NaN has no routing."""
    diverged, file = tmp_path / "diverged", "model.safetensors"
    shutil.copytree(moe_dir, diverged)
    tensors = load_file(diverged / file)
    tensors["lm_head.weight"] *= 1e6
    tensors["model.layers.2.mlp.gate.weight"].fill_(torch.nan)
    save_file(tensors, diverged / file, {"format": "pt"})
    models = ("--model", f"moe={moe_dir}", "--model", diverged)
    evaluate("routing", *models, *data, "--original-languages", "en", "--output", tmp_path / "out")
    actual = json.loads((tmp_path / "out/routing.json").read_text())["models"]
    assert None in actual["diverged"]["languages"]["en"]["entropy"]
    assert None not in actual["moe"]["languages"]["en"]["entropy"]
    tensors["model.layers.2.mlp.gate.weight"].fill_(1)
    save_file(tensors, diverged / file, {"format": "pt"})
    # Whoever reads the tables may stop before their end.
    monkeypatch.setattr(TextResults, "print", lambda _: (_ for _ in ()).throw(BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        evaluate(*models, *data, "--output", tmp_path / "out")
    actual = json.loads((tmp_path / "out/results.json").read_text())["models"]
    assert actual["diverged"]["languages"]["en"]["perplexity"]["value"] is None
    assert actual["moe"]["languages"]["en"]["perplexity"]["value"] > 0


def test_bad_arguments_are_rejected_with_the_flag_to_correct(rejected, tmp_path, data, dense_dir):
    model = ("--model", dense_dir)
    (tmp_path / "there.json").write_text("{}")
    for arguments, expected in [
        ((*model, "--model", dense_dir, *data), ("--model", "dense", "NAME=DIR")),
        ((*model, "--data", "a.jsonl"), ("--data", "LANG=FILE", "such as en=a.jsonl,")),
        (("--model", "=a", *data), ("--model", "NAME=DIR", "such as base=a,")),
        ((*model, "--data", f"en={tmp_path}/gone.jsonl"), ("gone.jsonl",)),
        ((*model, *data, "--original-languages", "en,fr"), ("--original-languages fr", "--data")),
        ((*model, *data, "--batch-size", "many"), ("--batch-size", "at least 1")),
        ((*model, *data, "--skip-tokens", 500), ("--skip-tokens", "500")),
        ((*model, *data, "--sequence-length", 100), ("--sequence-length", "at most 64", "100")),
        ((*model, *data, "--sequence-length", 8, "--context", 8), ("--context", "below", "8")),
        ((*model, *data, "--json-key", "body"), ("--json-key",)),
        ((*model, *data, "--device", "abacus"), ("--device", "cpu", "abacus")),
        ((*model, *data, "--seed", -1), ("--seed", "at least 0")),
        ((*model, "--data", "en=\udce9.jsonl"), ("--data", r"\xe9.jsonl", "not UTF-8")),
        ((*model, "--data", f"en={tmp_path}/there.json/x"), ("there.json/x", "Not a directory")),
        ((*model, *data, "--output", tmp_path / "there.json"), ("--output", "there.json")),
        ((*model, *data, "--output", tmp_path), ("--output", str(tmp_path))),
        (("--model", tmp_path / "nowhere", *data), ("nowhere",)),
        (("routing", *model, *data), ("--model", "dense", "MoE")),
        (("routing", *model, *data, "--threshold", 1), ("--threshold", "below 1")),
        (("routing", *model, *data, "--seed", 1), ("--seed",)),
        ((), ("--model", "--data")),
    ]:
        message = rejected(*arguments)
        assert all(part in message for part in expected), message
