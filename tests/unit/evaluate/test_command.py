"""`python -m moelpr.evaluate` from its arguments to its files and exit codes."""

import json
import os
import re
import shutil
import sys

import pytest

from moelpr.errors import UserError
from moelpr.evaluate import __main__ as command
from moelpr.evaluate import compare
from moelpr.evaluate.compare import compare_models, group_means, markdown_table
from moelpr.evaluate.generate import choose_prompt, continue_prompts
from moelpr.evaluate.models import load_model
from moelpr.evaluate.perplexity import Settings, score, score_each
from moelpr.languages import language_name


@pytest.fixture
def data(tmp_path, texts):
    for language, documents in texts.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        (tmp_path / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [word for language in texts for word in ("--data", f"{language}={tmp_path}/{language}.jsonl")]


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    command.main()


def test_command_prints_tables_and_writes_json_markdown_and_html(
    monkeypatch, capsys, tmp_path, data, dense_dir, moe_dir, texts
):
    output = tmp_path / "results"
    run(
        monkeypatch, "--model", f"base={dense_dir}", "--model", moe_dir, *data, "--original-languages", "en,zh",
        "--sequence-length", 16, "--max-documents", 2, "--output", output,
    )  # fmt: skip
    expected = score(load_model(dense_dir, "cpu"), {name: text[:2] for name, text in texts.items()}, Settings(16))
    content = json.loads((output / "results.json").read_text())
    assert content["settings"]["sequence_length"] == 16
    base, moe = content["models"]["base"], content["models"]["moe"]
    for language in texts:
        found = base["languages"][language]
        for metric in ("bits_per_byte", "perplexity", "accuracy"):
            assert found[metric]["value"] == pytest.approx(getattr(expected[language], metric))
            assert found[metric]["low"] <= found[metric]["value"] <= found[metric]["high"]
        assert found["documents"] == 2
        assert found["change"] == {}
        assert found["original_expert_share"] is None
        ours = moe["languages"][language]
        assert len(ours["original_expert_share"]["per_layer"]) == 2
        change = ours["bits_per_byte"]["value"] / found["bits_per_byte"]["value"] - 1
        assert ours["change"]["bits_per_byte"]["value"] == pytest.approx(change)
    means = [(expected["en"].bits_per_byte + expected["zh"].bits_per_byte) / 2, expected["el"].bits_per_byte]
    assert [mean["bits_per_byte"]["value"] for mean in base["means"].values()] == pytest.approx(means)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| el"))
    assert row.split("|")[2].split()[0] == f"{expected['el'].bits_per_byte:.3f}"
    markdown, page = (output / "results.md").read_text(), (output / "results.html").read_text()
    assert row in markdown and "![" in markdown
    assert "<svg" in page and f"{expected['el'].bits_per_byte:.3f}" in page
    assert not any(word in page for word in ("<script", "src=", "href="))


def test_a_single_document_has_no_interval_and_a_single_model_no_change(monkeypatch, tmp_path, capsys, dense_dir):
    (tmp_path / "one.jsonl").write_text('{"text": "The door is open."}')
    run(monkeypatch, "--model", dense_dir, "--data", f"en={tmp_path}/one.jsonl", "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())["models"]["dense"]["languages"]["en"]
    assert found["bits_per_byte"]["low"] is None and found["change"] == {}
    assert "[" not in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| en"))


def test_a_killed_evaluation_goes_on_and_what_has_changed_is_measured_anew(
    monkeypatch, tmp_path, data, dense_dir, moe_dir, texts
):
    measured = []

    def spy(loaded, documents, settings, *, name):
        for language, result in score_each(loaded, documents, settings, name=name):
            measured.append((name, language))
            yield language, result
            if len(measured) == killed_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(compare, "score_each", spy)
    base = tmp_path / "base"
    shutil.copytree(dense_dir, base)
    again = ("--model", base, "--model", moe_dir, *data, "--output", tmp_path / "out", "--sequence-length", 16)
    killed_after = 4
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *again)
    everything = [(model, language) for model in ("base", "moe") for language in texts]
    assert measured == everything[:4]
    killed_after = None
    run(monkeypatch, *again)
    assert measured == everything
    whole = (tmp_path / "out/results.json").read_text()
    measured.clear()
    run(monkeypatch, *again)
    run(monkeypatch, "routing", *again)
    assert measured == [] and (tmp_path / "out/results.json").read_text() == whole

    (tmp_path / "el.jsonl").write_text('{"text": "Άλλο κείμενο."}')
    run(monkeypatch, *again)
    assert measured == [("base", "el"), ("moe", "el")]
    measured.clear()
    os.utime(base / "model.safetensors", (1, 1))
    run(monkeypatch, *again)
    assert measured == [("base", language) for language in texts]
    measured.clear()
    run(monkeypatch, *again[:-1], 12)
    assert measured == everything


def test_routing_maps_name_the_layers_that_break_the_prior(
    monkeypatch, capsys, tmp_path, data, dense_dir, moe_dir, texts
):
    output = tmp_path / "out"
    run(
        monkeypatch, "routing", "--model", dense_dir, "--model", moe_dir, *data, "--original-languages", "en",
        "--output", output,
    )  # fmt: skip
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
        assert re.search(rf"moe: {language_name(language)} tokens choose .*\b{layer} \(", printed)
    assert page.count("<svg xmlns") == 5 and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert (output / "routing-moe-experts.svg").is_file()


def test_dense_models_have_no_routing_to_map(monkeypatch, data, dense_dir):
    with pytest.raises(UserError, match="dense have no routing"):
        run(monkeypatch, "routing", "--model", dense_dir, *data)


def test_bad_arguments_are_one_sentence(monkeypatch, tmp_path, data, dense_dir):
    model = ("--model", dense_dir)
    (tmp_path / "there.json").write_text("{}")
    for arguments, complaint in [
        ((*model, "--model", dense_dir, *data), "names dense twice"),
        ((*model, "--data", "en.jsonl"), "no NAME=PATH"),
        ((*model, "--data", f"en={tmp_path}/gone.jsonl"), "gone.jsonl"),
        ((*model, *data, "--original-languages", "en,fr"), "names fr"),
        ((*model, *data, "--max-documents", 0), "at least 1"),
        ((*model, *data, "--sequence-length", 0), "at least 1"),
        ((*model, *data, "--sequence-length", 100), "at most 64"),
        ((*model, *data, "--sequence-length", 8, "--context", 8), "does not fit"),
        ((*model, *data, "--json-key", "body"), "--json-key"),
        ((*model, *data, "--device", "abacus"), "no device"),
        ((*model, *data, "--output", tmp_path / "there.json"), "is a file"),
        ((*model, *data, "--output", tmp_path), "holds other things"),
        (("--model", tmp_path / "nowhere", *data), "does not exist"),
        (("routing", *model, *data, "--threshold", 1), "no share"),
        (("report", tmp_path), "python -m moelpr.report"),
    ]:
        with pytest.raises(UserError, match=complaint) as error:
            run(monkeypatch, *arguments)
        assert "\n" not in str(error.value)


def test_continuations_are_repeatable_and_belong_to_their_prompt(moe_dir, texts):
    loaded = load_model(moe_dir, device="cpu")
    prompts = {"a": texts["en"][0][:9], "b": texts["el"][0][:9]}
    greedy = continue_prompts(loaded, prompts, max_new_tokens=8)
    assert set(greedy) == {"a", "b"}
    assert continue_prompts(loaded, {"b": prompts["b"]}, max_new_tokens=8) == {"b": greedy["b"]}
    drawn = [continue_prompts(loaded, prompts, max_new_tokens=8, temperature=5.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_greedy_continuation_is_the_likeliest_token_each_time(dense_dir, texts):
    import torch

    loaded = load_model(dense_dir, device="cpu")
    prompt = texts["en"][1][:20]
    ids = [loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    length = len(ids)
    with torch.no_grad():
        while len(ids) < length + 6 and (len(ids) == length or ids[-1] != loaded.eos_id):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = loaded.tokenizer.decode(ids[length:], skip_special_tokens=True)
    expected = next((line for line in text.split("\n") if line.strip()), "").rstrip("\ufffd ")
    assert continue_prompts(loaded, {"x": prompt}, max_new_tokens=6)["x"] == expected


def test_prompts_are_first_words_and_the_text_goes_on():
    prompt = choose_prompt(
        ["Too short", "One two three four five six seven eight nine ten eleven twelve thirteen fourteen"]
    )
    assert prompt.text == "One two three four five six seven"
    assert prompt.reference == "eight nine ten eleven twelve thirteen fourteen"
    chinese = choose_prompt(["有人晚回家时开灯早上再关掉,这样家里就不会太暗。"])
    assert chinese.text == "有人晚回家时开灯早上"
    assert choose_prompt(["Too short"]).text == "Too short"


def test_models_side_by_side_see_the_same_windows(dense_dir, moe_dir, texts):
    results = compare_models({"base": dense_dir, "stage1": moe_dir}, texts, prompts={"en": "The"}, max_new_tokens=3)
    assert results["base"].original_expert_share is None
    assert set(results["stage1"].original_expert_share) == set(texts)
    assert set(results["base"].continuations) == {"en"}


def test_means_and_table():
    values = {"en": 1.0, "zh": 2.0, "el": 4.0}
    assert group_means(values, ["en", "zh"]) == {"mean original": 1.5, "mean expanded": 4.0}
    assert markdown_table({"m": {"en": 1.0, "el": 2.25}}, digits=2).splitlines() == [
        "| model |   en |   el |",
        "| ----- | ---: | ---: |",
        "| m     | 1.00 | 2.25 |",
    ]
