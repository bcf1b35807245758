"""gigatoken is used only if its IDs are the tokenizer's; a job's tokenizer is loaded with what it adds to texts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_tools.corpus.corpus import Corpus
from moelpr.base.errors import UserError
from moelpr.data.tokenizers import gigatoken
from moelpr.data.tokenizers.base import Encoded
from moelpr.data.tokenizers.gigatoken import PROBES, Gigatoken
from moelpr.data.tokenizers.loading import load_tokenizer
from tests.support.hf_models import save_extended_tokenizer

FLAGS = ("--language", "original", "--append-eod")


@pytest.fixture(scope="module")
def fast_backends(hf_tokenizer: Path, sp_tokenizer: Path) -> list[Gigatoken]:
    references = [load_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer))]
    references += [load_tokenizer("SentencePieceTokenizer", str(sp_tokenizer))]
    return [Gigatoken(reference) for reference in references]


def test_both_libraries_write_the_same_corpus(tokenizer, sentences, write_lines, preprocess, corpus_bytes) -> None:
    texts = [*PROBES, *sentences.values(), "a</s>b <s>", "x" * 3000, " \n\t "]
    lines = write_lines("a.jsonl", [{"text": text} for text in texts])
    fast = preprocess(tokenizer, "--input", lines, *FLAGS, "--tokenizer-backend", "gigatoken", out="fast/a")
    slow = preprocess(tokenizer, "--input", lines, *FLAGS, "--tokenizer-backend", "reference", out="slow/a")
    assert corpus_bytes(f"{fast}_text_document") == corpus_bytes(f"{slow}_text_document")


def test_an_extended_tokenizer_needs_nothing_new(
    hf_tokenizer: Path, sentences, write_lines, preprocess, corpus_bytes, tmp_path: Path
) -> None:
    old = Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    old.no_truncation()
    tokens = old.encode("θάλασσα", add_special_tokens=False).tokens
    new = [("".join(tokens[:n]), tokens[n]) for n in range(1, len(tokens))]
    extended = save_extended_tokenizer(hf_tokenizer, tmp_path / "extended", new)
    texts = [*PROBES, *sentences.values(), "θάλασσα", "θάλασσα, θάλασσα!", "a</s>b <s>"]
    lines = write_lines("a.jsonl", [{"text": text} for text in texts])
    given = ("--input", lines, *FLAGS, "--tokenizer-backend")
    fast = preprocess(extended, *given, "gigatoken", out="fast/a")
    slow = preprocess(extended, *given, "reference", out="slow/a")
    assert corpus_bytes(f"{fast}_text_document") == corpus_bytes(f"{slow}_text_document")
    ids = np.frombuffer(corpus_bytes(f"{fast}_text_document")[0], np.uint16)
    assert (ids == old.get_vocab_size() + len(new) - 1).sum() == 3  # the whole word is one new token


@settings(max_examples=150, deadline=None)
@example(["\x85"])
@example(["\xa8\u17b4", "\xa8\u17b5"])
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=5))
def test_both_libraries_agree_on_any_text(fast_backends: list[Gigatoken], texts: list[str]) -> None:
    for backend in fast_backends:
        assert backend.agrees(texts)


def test_unsupported_tokenizer_falls_back_with_a_note(write_lines, preprocess, unigram_tokenizer, capsys) -> None:
    lines = write_lines("a.jsonl", [{"text": "light"}])
    preprocess(unigram_tokenizer, "--input", lines, *FLAGS)
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith("note: tokenizing with sentencepiece, not gigatoken: ")
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken"):
        flags = (*FLAGS, "--tokenizer-backend", "gigatoken")
        preprocess(unigram_tokenizer, "--input", lines, *flags, out="other/a")


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


def test_different_ids_in_the_corpus_fall_back(
    write_lines, preprocess, hf_tokenizer, corpus_bytes, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines("a.jsonl", [{"text": "plain"}] * 50 + [{"text": "strange"}])
    slow = preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--tokenizer-backend", "reference", out="slow/a")
    differ_on(monkeypatch, "strange")
    capsys.readouterr()
    prefix = preprocess(hf_tokenizer, "--input", lines, *FLAGS)
    assert "not gigatoken: " in capsys.readouterr().err
    assert corpus_bytes(f"{prefix}_text_document") == corpus_bytes(f"{slow}_text_document")


def test_different_ids_during_the_job_stop_it(write_lines, preprocess, hf_tokenizer, monkeypatch, tmp_path) -> None:
    """A document of each batch is encoded by both; here the sample before the start misses what differs."""
    monkeypatch.setattr("data_tools.preprocessing.inputs.Inputs.sample_texts", lambda *_: [])
    differ_on(monkeypatch, "strange")
    lines = write_lines("a.jsonl", [{"text": "strange"}])
    with pytest.raises(UserError, match="'strange'.*--tokenizer-backend reference"):
        preprocess(hf_tokenizer, "--input", lines, *FLAGS)
    assert list((tmp_path / "out").iterdir()) == []


def test_job_runs_without_gigatoken(write_lines, preprocess, hf_tokenizer, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    preprocess(hf_tokenizer, "--input", write_lines("a.jsonl", [{"text": "a"}]), *FLAGS)
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


def test_end_of_document_token_can_be_named(hf_tokenizer: Path, write_lines, preprocess, corpus_bytes) -> None:
    lines = write_lines("a.jsonl", [{"text": "a"}])
    prefix = preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--eod-token", "<|endoftext|>")
    ids = np.frombuffer(corpus_bytes(f"{prefix}_text_document")[0], np.uint16)
    assert ids[-1] == json.loads((hf_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(UserError, match=r"--eod-token <\|endoftexts\|>.*<\|endoftext\|>"):
        preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--eod-token", "<|endoftexts|>", out="other/a")


def test_tokenizer_written_in_python_is_supported_without_offsets(write_lines, preprocess, tmp_path, capsys) -> None:
    """ByT5 has no tokenizer.json: the ID of a byte is its value plus 3."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    lines = write_lines("a.jsonl", [{"text": "añ"}, {"text": "b"}])
    prefix = preprocess(tmp_path / "byt5", "--input", lines, "--language", "original")
    corpus = Corpus(f"{prefix}_text_document")
    end = 1  # </s>, which ByT5 adds to each text
    assert corpus.document(0)[0].tolist() == [*(byte + 3 for byte in "añ".encode()), end]
    assert corpus.document(1)[0].tolist() == [ord("b") + 3, end]
    assert "tokenizing with transformers" in capsys.readouterr().err
    spans = write_lines("b.jsonl", [{"spans": [{"text": "a", "lang": "en"}, {"text": "b", "lang": "el"}]}])
    with pytest.raises(UserError, match="tokenizer.json"):
        flags = ("--spans-key", "spans", "--original-languages", "en")
        preprocess(tmp_path / "byt5", "--input", spans, *flags, out="spans/a")
