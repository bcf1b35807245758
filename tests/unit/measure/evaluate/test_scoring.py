import dataclasses
import json
import math
import os
import re
import unicodedata

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from moelpr.base.errors import UserError
from moelpr.measure.evaluate.models import load_model
from moelpr.measure.evaluate.scoring import IGNORED, LanguageScore, Settings, cut_into_windows


@pytest.fixture(scope="module")
def dense(dense_dir):
    return load_model(dense_dir, device="cpu")


def plain_bits(loaded, text: str, window: int, context: int, skipped: int = 0) -> float:
    """−log2 p of one document: every token on its own, from the definition in the module's docstring."""
    tokens = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    sequence = [loaded.tokenizer.eos_token_id, *tokens]
    bits = 0.0
    for position in range(1 + skipped, len(sequence)):
        # The k-th later window predicts the next `window - context` tokens.
        later = max(0, math.ceil((position - window) / (window - context)))
        first = later * (window - context)
        logits = loaded.model(torch.tensor([sequence[first:position]])).logits[0, -1].double()
        bits -= logits.log_softmax(-1)[sequence[position]].item() / math.log(2)
    return bits


@pytest.mark.parametrize(
    ("window", "context", "skipped"), [(64, 0, 0), (8, 0, 0), (8, 3, 0), (5, 4, 0), (8, 3, 1), (8, 3, 6), (8, 3, 13)]
)
def test_bits_per_byte_equals_a_plain_loop_over_tokens(score, dense, texts, window, context, skipped):
    """Tokens that are skipped are context and nothing else."""
    result = score(dense, texts, Settings(window, context, skip_tokens=skipped))
    with torch.no_grad():
        for language, documents in texts.items():
            bits = [plain_bits(dense, text, window, context, skipped) for text in documents]
            actual, size = result[language], sum(result[language].document_bytes)
            assert actual.document_bits == pytest.approx(bits, rel=1e-5)
            assert actual.metrics["bits_per_byte"] == pytest.approx(sum(bits) / size, rel=1e-5)
            tokens = [dense.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
            assert actual.document_tokens == [max(0, len(ids) - skipped) for ids in tokens]
            left = [len(dense.tokenizer.decode(ids[skipped:]).lstrip("\ufffd").encode()) for ids in tokens]
            assert actual.document_bytes == pytest.approx(left, abs=4 if skipped else 0)  # a cut letter counts
        # It depends on the window; else this would pass for any.
        assert bits != pytest.approx([plain_bits(dense, text, 6, 0, skipped) for text in documents], rel=1e-4)


@pytest.mark.parametrize("directory", ["dense_dir", "moe_dir"])
def test_batch_size_and_order_change_nothing(score, request, texts, directory):
    loaded = load_model(request.getfixturevalue(directory), device="cpu")
    one = score(loaded, texts, Settings(16, 4, batch_size=1))
    many = score(loaded, {name: documents[::-1] for name, documents in texts.items()}, Settings(16, 4, batch_size=50))
    for language, ours in one.items():
        theirs = many[language]
        assert theirs.metrics["bits_per_byte"] == pytest.approx(ours.metrics["bits_per_byte"], abs=1e-5)
        if ours.routing:
            assert theirs.routing.tokens == ours.routing.tokens
            np.testing.assert_allclose(theirs.routing.mean_score, ours.routing.mean_score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 7, 23])
@pytest.mark.parametrize("context", [0, 1, 4])
def test_windows_predict_each_token_exactly_once(length, context):
    tokens = list(range(1, length + 1))
    windows = list(cut_into_windows(0, tokens, start_id=0, length=5, context=context))
    assert [target for window in windows for target in window.targets if target != IGNORED] == tokens
    for window in windows:
        assert len(window.inputs) == len(window.targets) <= 5
        # Tokens are their own positions here, so what follows an input is its number plus one.
        assert all(target in (IGNORED, value + 1) for value, target in zip(window.inputs, window.targets, strict=True))


def test_the_default_window_is_what_all_models_support():
    assert Settings().resolve({"a": 64, "b": 4096, "c": None}) == Settings(64, 16)
    assert Settings().resolve({"b": 4096}) == Settings(512, 128)


def test_a_tokenizer_with_more_ids_than_embeddings_is_rejected(score, tmp_path, dense_dir, texts, tokenizer):
    model = Qwen2ForCausalLM.from_pretrained(dense_dir)
    model.resize_token_embeddings(len(tokenizer) - 40)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"tokenizer .* {len(tokenizer) - 40} embeddings"):
        score(load_model(tmp_path, device="cpu"), texts)


def test_accuracy_and_perplexity_equal_a_plain_loop(score, dense, texts):
    with torch.no_grad():
        for language, result in score(dense, texts, Settings(64, 0)).items():
            right, nats = 0, 0.0
            for text in texts[language]:
                ids = [dense.start_id, *dense.tokenizer(text, add_special_tokens=False)["input_ids"]]
                logits = dense.model(torch.tensor([ids])).logits[0, :-1]
                right += (logits.argmax(-1) == torch.tensor(ids[1:])).sum().item()
                nats -= logits.double().log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()
            assert result.metrics["accuracy"] == right / sum(result.document_tokens)
            assert result.metrics["perplexity"] == pytest.approx(math.exp(nats / sum(result.document_tokens)), rel=1e-5)
            assert LanguageScore.from_json(json.loads(json.dumps(dataclasses.asdict(result)))) == result


class PickyTokenizer:
    """Supports only the letters of "The door". unk_token_id None: it omits all other text silently."""

    def __init__(self, unk_token_id: int | None):
        self.unk_token_id = unk_token_id

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        ids = [["The door".find(letter) for letter in text] for text in texts]
        unknown = [] if self.unk_token_id is None else [self.unk_token_id]
        return {"input_ids": [[i for known in row for i in ([known] if known >= 0 else unknown)] for row in ids]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join("The door?"[i] for i in ids)


class PanicException(BaseException):
    """As those of pyo3, which are no `Exception`."""


def test_a_panic_of_the_tokenizer_is_one_sentence_without_its_trace(score, dense, capfd) -> None:
    def panic(*_: object, **__: object) -> None:
        os.write(2, b"thread '<unnamed>' panicked")
        raise PanicException("out of bounds")

    with pytest.raises(UserError, match=r"\(out of bounds\); download the tokenizer again"):
        score(dataclasses.replace(dense, tokenizer=panic), {"en": ["a"]})
    assert capfd.readouterr().err == ""


def test_a_tokenizer_may_compose_letters(score, dense):
    class Composing(PickyTokenizer):
        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0] for _ in texts]}

        def decode(self, ids: list[int], **_: object) -> str:
            return unicodedata.normalize("NFC", text)

    text = unicodedata.normalize("NFD", "한국어")
    composing = dataclasses.replace(dense, tokenizer=Composing(unk_token_id=None))
    assert score(composing, {"ko": [text]})["ko"].document_bytes == [len(text.encode())]


def test_text_that_a_tokenizer_cannot_encode_is_reported_and_what_it_omits_rejected(score, dense, capsys):
    picky = dataclasses.replace(dense, tokenizer=PickyTokenizer(unk_token_id=8))
    assert score(picky, {"el": ["The ρ", "door"]})["el"].unknown_tokens == 1
    assert re.search("warning: dense .* 11.1% of the el tokens", capsys.readouterr().err)
    picky = dataclasses.replace(dense, tokenizer=PickyTokenizer(unk_token_id=None))
    assert score(picky, {"en": ["The door"]})["en"].document_tokens == [8]
    with pytest.raises(UserError, match=r"tokenizer .* 38\.5% of the letters of el"):
        score(picky, {"el": ["The door", "d πόρτα"]})
    with pytest.raises(UserError, match="tokenizer .* 50.0% of the el documents, number 2"):
        score(picky, {"el": ["The door", "??"]})
