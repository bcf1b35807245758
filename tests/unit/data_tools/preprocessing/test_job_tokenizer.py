"""gigatoken is used only if its IDs are the tokenizer's; a job's tokenizer is loaded with what it adds to texts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moelpr.base.errors import UserError
from moelpr.data.tokenizers import gigatoken
from moelpr.data.tokenizers.base import Encoded
from moelpr.data.tokenizers.gigatoken import PROBES, Gigatoken
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.support.hf_models import save_extended_tokenizer
from tests.unit.data_tools.conftest import SENTENCES

FLAGS = ("--language", "original", "--append-eod")
ONE = [{"text": "light"}]


@pytest.fixture(scope="module")
def fast_backends(hf_tokenizer: Path, sp_tokenizer: Path) -> list[Gigatoken]:
    references = [load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))]
    references += [load_tokenizer("SentencePieceTokenizer", str(sp_tokenizer))]
    return [Gigatoken(reference) for reference in references]


@pytest.fixture
def by_both(preprocess: Callable) -> Callable[[list[str], Path], list[bytes]]:
    """The corpus of texts, which both libraries write."""

    def run(texts: list[str], tokenizer: Path) -> list[bytes]:
        words, documents = (*FLAGS, "--tokenizer-backend"), [{"text": text} for text in texts]
        names = "gigatoken", "reference"
        fast, slow = (preprocess(documents, *words, name, tokenizer=tokenizer, out=name).content() for name in names)
        assert fast == slow
        return fast

    return run


def test_both_libraries_write_the_same_corpus(tokenizer: Path, by_both) -> None:
    assert by_both([*PROBES, *SENTENCES.values(), "a</s>b <s>", "x" * 3000, " \n\t "], tokenizer)


def test_an_extended_tokenizer_needs_nothing_new(hf_tokenizer: Path, by_both, tmp_path: Path) -> None:
    old = Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    old.no_truncation()
    tokens = old.encode("θάλασσα", add_special_tokens=False).tokens
    new = [("".join(tokens[:n]), tokens[n]) for n in range(1, len(tokens))]
    extended = save_extended_tokenizer(hf_tokenizer, tmp_path / "extended", new)
    texts = [*PROBES, *SENTENCES.values(), "θάλασσα", "θάλασσα, θάλασσα!", "a</s>b <s>"]
    ids = np.frombuffer(by_both(texts, extended)[0], np.uint16)
    assert (ids == old.get_vocab_size() + len(new) - 1).sum() == 3  # the whole word is one new token


@settings(max_examples=150, deadline=None)
@example(["\x85"])
@example(["\xa8\u17b4", "\xa8\u17b5"])
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=5))
def test_both_libraries_agree_on_any_text(fast_backends: list[Gigatoken], texts: list[str]) -> None:
    for backend in fast_backends:
        assert backend.agrees(texts)


def test_unsupported_tokenizer_falls_back_with_a_note(preprocess, unigram_tokenizer: Path, capsys) -> None:
    preprocess(ONE, *FLAGS, tokenizer=unigram_tokenizer)
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith("note: tokenizing with sentencepiece, not gigatoken: ")
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken"):
        preprocess(ONE, *FLAGS, "--tokenizer-backend", "gigatoken", tokenizer=unigram_tokenizer, out="other/a")


class PanicException(BaseException):
    """As pyo3 raises it: no Exception, and its module cannot be imported."""

    __module__ = "pyo3_runtime"


@pytest.mark.parametrize("error", [Exception("Token `ab` out of vocabulary"), PanicException("range end index 14")])
def test_a_tokenizer_that_the_library_rejects(error, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library raises an Exception of no kind for a merge into a token that there is not, or panics."""

    def reject(*_: object) -> None:
        raise error

    monkeypatch.setattr("moelpr.data.tokenizers.loading.HuggingFaceTokenizer", reject)
    with pytest.raises(UserError, match=str(error)):
        load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))


def differ_on(monkeypatch: pytest.MonkeyPatch, marked: str) -> None:
    """Make gigatoken encode one kind of text wrongly."""
    right = Gigatoken.encode

    def encode(self: Gigatoken, texts: list[str]) -> Encoded:
        return right(self, [text.replace(marked, "?") for text in texts])

    monkeypatch.setattr(Gigatoken, "encode", encode)


def test_different_ids_in_the_corpus_fall_back(preprocess, capsys, monkeypatch) -> None:
    documents = [{"text": "plain"}] * 50 + [{"text": "strange"}]
    slow = preprocess(documents, *FLAGS, "--tokenizer-backend", "reference", out="slow/a")
    differ_on(monkeypatch, "strange")
    capsys.readouterr()
    assert preprocess(documents, *FLAGS).content() == slow.content()
    assert "not gigatoken: " in capsys.readouterr().err


def test_different_ids_during_the_job_stop_it(preprocess, monkeypatch, tmp_path: Path) -> None:
    """A document of each batch is encoded by both; here the sample before the start misses what differs."""
    monkeypatch.setattr("data_tools.preprocessing.inputs.Inputs.sample_texts", lambda *_: [])
    differ_on(monkeypatch, "strange")
    with pytest.raises(UserError, match="'strange'.*--tokenizer-backend reference"):
        preprocess([{"text": "strange"}], *FLAGS)
    assert list((tmp_path / "out").iterdir()) == []


def test_job_runs_without_gigatoken(preprocess, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    preprocess(ONE, *FLAGS)
    assert "extra fast-tokenizer" in capsys.readouterr().err


def test_cache_is_dropped_when_it_is_full(hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Gigatoken(load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer)))
    limit = gigatoken._CACHE_BYTES
    # The third is too much; what is left after forgetting, most of it, is what the next ones are measured by.
    sizes = iter([0, limit, limit + 1, limit - 1, 2 * limit - 1, 2 * limit])
    monkeypatch.setattr(gigatoken, "_resident_bytes", lambda: next(sizes))
    seen = []
    for _ in range(4):
        assert backend.encode(["turn on the light"]).ids.size
        seen.append(backend._tokenizer)
    assert seen[0] is seen[1] and seen[1] is not seen[2] and seen[2] is seen[3]


def test_end_of_document_token_can_be_named(hf_tokenizer: Path, preprocess) -> None:
    ids = preprocess(ONE, *FLAGS, "--eod-token", "<|endoftext|>").corpus().tokens
    assert ids[-1] == json.loads((hf_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(UserError, match=r"--eod-token <\|endoftexts\|>.*<\|endoftext\|>"):
        preprocess(ONE, *FLAGS, "--eod-token", "<|endoftexts|>", out="other/a")


def test_a_tokenizer_written_in_python_is_refused(preprocess, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(folder := tmp_path / "byt5")
    with pytest.raises(UserError, match="byt5 is a ByT5Tokenizer.*tokenizer.json"):
        preprocess(ONE, "--language", "original", tokenizer=folder)
