"""Continuations against a plain loop, and the choice of prompts."""

import torch

from moelpr.evaluate.generate import choose_prompt, continue_prompt
from moelpr.evaluate.models import load_model


def test_a_continuation_is_the_most_likely_token_each_time(dense_dir, texts):
    loaded = load_model(dense_dir, device="cpu")
    prompt = texts["en"][1][:20]
    ids = [loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    length = len(ids)
    with torch.no_grad():
        while len(ids) < length + 6 and (len(ids) == length or ids[-1] != loaded.eos_id):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = loaded.tokenizer.decode(ids[length:], skip_special_tokens=True)
    expected = next((line for line in text.split("\n") if line.strip()), "").rstrip("\ufffd ")
    assert continue_prompt(loaded, prompt, max_new_tokens=6) == expected


def test_continuations_are_repeatable_and_depend_on_the_prompt(moe_dir, texts):
    loaded = load_model(moe_dir, device="cpu")
    first, second = texts["en"][0][:9], texts["el"][0][:9]
    written = [continue_prompt(loaded, prompt, max_new_tokens=8) for prompt in (first, second, first)]
    assert written[0] == written[2] != written[1]


def test_a_prompt_is_the_first_words_of_a_document_that_continues():
    prompt, reference = choose_prompt(
        ["Too short", "One two three four five six seven eight nine ten eleven twelve thirteen fourteen"]
    )
    assert prompt == "One two three four five six seven"
    assert reference == "eight nine ten eleven twelve thirteen fourteen"
    chinese, _ = choose_prompt(["有人晚回家时开灯早上再关掉,这样家里就不会太暗。"])
    assert chinese == "有人晚回家时开灯早上"
    assert choose_prompt(["Too short"]) == ("Too short", "")
