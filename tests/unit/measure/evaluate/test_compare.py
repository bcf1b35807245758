"""Several models on the same windows, continuations against a plain loop, and results that are kept for a rerun."""

import json
import os
import shutil
from functools import partial

import pytest
import torch

from moelpr.measure.evaluate import compare
from moelpr.measure.evaluate.compare import choose_prompts, compare_models, continue_prompts
from moelpr.measure.evaluate.models import load_model
from moelpr.measure.evaluate.result_cache import ResultCache
from moelpr.measure.evaluate.scoring import Settings


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, str]]:
    """The measurements, in order: (model, language) or (folder, prompt)."""
    log: list[tuple[str, str]] = []
    score_each, continue_prompts = compare.score_each, compare.continue_prompts

    def spy_on_scores(loaded, documents, settings, name):
        for language, result in score_each(loaded, documents, settings, name):
            log.append((name, language))
            yield language, result

    def spy_on_continuations(loaded, prompts, tokens):
        log.extend((loaded.directory.name, prompt) for prompt in prompts)
        return continue_prompts(loaded, prompts, tokens)

    monkeypatch.setattr(compare, "score_each", spy_on_scores)
    monkeypatch.setattr(compare, "continue_prompts", spy_on_continuations)
    return log


def test_an_interrupted_evaluation_resumes_and_only_what_has_changed_is_measured_again(
    monkeypatch, measured, evaluate, tmp_path, data, dense_dir, moe_dir, texts
):
    base = tmp_path / "base"
    shutil.copytree(dense_dir, base)
    again = ("--model", base, "--model", moe_dir, *data, "--output", tmp_path / "out", "--sequence-length", 16)
    write = ResultCache.write

    def write_four(*arguments):
        write(*arguments)
        if len(measured) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultCache, "write", write_four)
    everything = [(model, language) for model in ("base", "moe") for language in texts]
    with pytest.raises(KeyboardInterrupt):
        evaluate(*again)
    assert measured == everything[:4]
    monkeypatch.setattr(ResultCache, "write", write)
    evaluate(*again)
    assert measured == everything
    complete = (tmp_path / "out/results.json").read_text()
    measured.clear()
    evaluate(*again)
    evaluate("routing", *again)
    assert measured == [] and (tmp_path / "out/results.json").read_text() == complete

    (tmp_path / "el.jsonl").write_text('{"text": "Άλλο κείμενο."}')
    evaluate(*again)
    assert measured == [("base", "el"), ("moe", "el")]
    measured.clear()
    os.utime(base / "model.safetensors", (1, 1))
    evaluate(*again)
    assert measured == [("base", language) for language in texts]
    for changed in ((*again[:-1], 12), (*again, "--context", 3), (*again, "--dtype", "bfloat16")):
        measured.clear()
        evaluate(*changed)
        assert measured == everything, changed


def test_continuations_are_kept_until_their_length_changes(measured, tmp_path, dense_dir, texts):
    run = partial(compare_models, {"dense": dense_dir}, texts, device="cpu", cache=ResultCache(tmp_path))
    first = run(continuation_tokens=4)
    assert len(measured) == 2 * len(texts)
    measured.clear()
    assert run(continuation_tokens=4) == first and measured == []
    run(continuation_tokens=3)
    assert [prompt for _, prompt in measured] == [continuation.prompt for continuation in first.continuations.values()]


def test_a_damaged_result_is_measured_again(measured, tmp_path, dense_dir, texts):
    cache = ResultCache(tmp_path)
    first = compare_models({"dense": dense_dir}, texts, device="cpu", cache=cache)
    measured.clear()
    file = tmp_path / "parts/dense/en.json"
    content = json.loads(file.read_text())
    content["result"]["document_bits"][0] += 1
    for damaged in (json.dumps(content), json.dumps(content | {"result": {}}), json.dumps([]), "", "[" * 100_000):
        file.write_text(damaged)
        assert compare_models({"dense": dense_dir}, texts, device="cpu", cache=cache) == first
        assert measured == [("dense", "en")]
        measured.clear()


def test_models_side_by_side_see_the_same_windows(dense_dir, moe_dir, texts, monkeypatch):
    monkeypatch.setattr(compare, "read_max_positions", lambda path: 20 if path == moe_dir else 64)
    comparison = compare_models({"base": dense_dir, "moe": moe_dir}, texts, device="cpu")
    assert comparison.settings == Settings(20, 5)
    assert list(comparison.scores) == ["base", "moe"]
    alone = compare_models({"base": dense_dir}, texts, Settings(20, 5), device="cpu")
    assert alone.scores["base"] == comparison.scores["base"]


@pytest.mark.parametrize("penalty", [None, 5.0])
def test_a_continuation_is_the_most_likely_token_each_time(dense_dir, texts, penalty):
    loaded = load_model(dense_dir, device="cpu")
    loaded.model.generation_config.repetition_penalty = penalty  # a base's generation_config.json may have one
    prompts = [texts["en"][1][:20], texts["en"][0][:3], texts["el"][0][:11]]  # one batch of several lengths
    for prompt, actual in zip(prompts, continue_prompts(loaded, prompts, max_new_tokens=6), strict=True):
        ids = [loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        length = len(ids)
        with torch.no_grad():
            while len(ids) < length + 6 and (len(ids) == length or ids[-1] != loaded.eos_id):
                ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = loaded.tokenizer.decode(ids[length:], skip_special_tokens=True)
        assert actual == next((line for line in text.split("\n") if line.strip()), "").rstrip("\ufffd ")


def test_a_prompt_is_the_first_words_of_a_document_that_continues():
    documents = ["Too short", "One two three four five six seven eight nine ten eleven twelve thirteen fourteen"]
    (prompt, reference), other = choose_prompts([*documents, "Others too are a fine text: " * 3, "left " * 50], 2)
    assert other[0] == "Others too are a fine text: Others"
    assert prompt == "One two three four five six seven"
    assert reference == "eight nine ten eleven twelve thirteen fourteen"
    ((chinese, _),) = choose_prompts(["有人晚回家时开灯早上再关掉,这样家里就不会太暗。"], 1)
    assert chinese == "有人晚回家时开灯早上"
    assert choose_prompts(["Too short"], 3) == [("Too short", "")]
