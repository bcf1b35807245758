"""`python -m moelpr.evaluate` from its arguments to its files and exit codes."""

import json
import sys

import pytest

from moelpr.errors import UserError
from moelpr.evaluate import __main__ as command
from moelpr.evaluate.compare import compare_models, group_means, markdown_table
from moelpr.evaluate.generate import choose_prompt, continue_prompts
from moelpr.evaluate.models import load_model
from moelpr.evaluate.perplexity import Settings, score


@pytest.fixture
def data(tmp_path, texts):
    for language, documents in texts.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        (tmp_path / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [word for language in texts for word in ("--data", f"{language}={tmp_path}/{language}.jsonl")]


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    command.main()


def test_command_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path, data, dense_dir, moe_dir, texts):
    output = tmp_path / "results.json"
    run(
        monkeypatch, "--model", f"base={dense_dir}", "--model", moe_dir, *data, "--original-languages", "en,zh",
        "--sequence-length", 16, "--max-documents", 2, "--output", output,
    )  # fmt: skip
    expected = score(load_model(dense_dir, "cpu"), {name: text[:2] for name, text in texts.items()}, Settings(16))
    content = json.loads(output.read_text())
    assert content["settings"]["sequence_length"] == 16
    base = content["models"]["base"]
    for language in texts:
        assert base["languages"][language]["bits_per_byte"] == pytest.approx(expected[language].bits_per_byte)
        assert base["languages"][language]["documents"] == 2
        assert base["languages"][language]["routing"] is None
        assert (
            len(content["models"]["moe"]["languages"][language]["routing"]["original_expert_share"]["per_layer"]) == 2
        )
    means = [(expected["en"].bits_per_byte + expected["zh"].bits_per_byte) / 2, expected["el"].bits_per_byte]
    assert list(base["means"].values()) == pytest.approx(means)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| base"))
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        f"{value:.3f}" for value in [*(expected[name].bits_per_byte for name in texts), *means]
    ]
    assert "first choices" in printed


def test_bad_arguments_are_one_sentence(monkeypatch, tmp_path, data, dense_dir):
    model = ("--model", dense_dir)
    (tmp_path / "there.json").write_text("{}")
    for arguments, complaint in [
        ((*model, "--model", dense_dir, *data), "names dense twice"),
        ((*model, "--data", "en.jsonl"), "no NAME=PATH"),
        ((*model, *data, "--original-languages", "en,fr"), "names fr"),
        ((*model, *data, "--max-documents", 0), "at least 1"),
        ((*model, *data, "--sequence-length", 0), "at least 1"),
        ((*model, *data, "--sequence-length", 100), "at most 64"),
        ((*model, *data, "--sequence-length", 8, "--context", 8), "does not fit"),
        ((*model, *data, "--json-key", "body"), "--json-key"),
        ((*model, *data, "--device", "abacus"), "no device"),
        ((*model, *data, "--output", tmp_path / "there.json"), "exists already"),
        (("--model", tmp_path / "nowhere", *data), "does not exist"),
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
