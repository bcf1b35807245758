"""gigatoken is used where its ids are the tokenizer's, and nowhere else."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.preprocessing import backends
from data_tools.preprocessing.backends import Encoded, GigatokenBackend, choose_backend
from data_tools.preprocessing.tokenizing import JobTokenizer, load_job_tokenizer
from moelpr.errors import UserError

FLAGS = ("--language", "original", "--append-eod")


@pytest.fixture(scope="module")
def jobs(hf_tokenizer: Path, sp_tokenizer: Path) -> dict[str, JobTokenizer]:
    return {
        "hf": load_job_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer), True, None),
        "sp": load_job_tokenizer("SentencePieceTokenizer", str(sp_tokenizer), True, None),
    }


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_the_fast_library_stands_in_for_both_types(kind: str, jobs: dict[str, JobTokenizer]) -> None:
    backend, reason = choose_backend(jobs[kind].reference(), jobs[kind].source, ["a text"], is_wanted=True)
    assert (backend.name, reason) == ("gigatoken", None)


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_both_libraries_write_the_same_corpus(
    kind: str, hf_tokenizer: Path, sp_tokenizer: Path, sentences, write_lines, preprocess, corpus_bytes
) -> None:
    tokenizer = hf_tokenizer if kind == "hf" else sp_tokenizer
    texts = [*backends.PROBES, *sentences.values(), "a</s>b <s>", "x" * 3000, " \n\t "]
    lines = write_lines("a.jsonl", [{"text": text} for text in texts])
    fast = preprocess(tokenizer, "--input", lines, *FLAGS, "--tokenizer-backend", "gigatoken", out="fast/a")
    slow = preprocess(tokenizer, "--input", lines, *FLAGS, "--tokenizer-backend", "reference", out="slow/a")
    assert corpus_bytes(f"{fast}_text_document") == corpus_bytes(f"{slow}_text_document")


@settings(max_examples=150, deadline=None)
@example(["\x85"])
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=5))
def test_both_libraries_agree_on_any_text(fast_backends: list[GigatokenBackend], texts: list[str]) -> None:
    for backend in fast_backends:
        assert backend.agrees(texts)


@pytest.fixture(scope="module")
def fast_backends(jobs: dict[str, JobTokenizer]) -> list[GigatokenBackend]:
    return [GigatokenBackend(job.source, job.reference()) for job in jobs.values() if job.source is not None]


def test_a_tokenizer_it_does_not_support_falls_back_with_one_line(
    write_lines, preprocess, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["turn on the light"] * 5),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    lines = write_lines("a.jsonl", [{"text": "light"}])
    preprocess(tmp_path / "unigram.model", "--input", lines, *FLAGS)
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith(
        "note: tokenizing with sentencepiece, not gigatoken: it does not support this tokenizer (only"
    )
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken can't be had: it does not support"):
        flags = (*FLAGS, "--tokenizer-backend", "gigatoken")
        preprocess(tmp_path / "unigram.model", "--input", lines, *flags, out="other/a")


def differ_on(monkeypatch: pytest.MonkeyPatch, marked: str) -> None:
    """Let gigatoken encode one kind of text wrongly."""
    right = GigatokenBackend.encode

    def encode(self: GigatokenBackend, texts: list[str]) -> Encoded:
        return right(self, [text.replace(marked, "?") for text in texts])

    monkeypatch.setattr(GigatokenBackend, "encode", encode)


def test_other_ids_on_the_very_corpus_fall_back(
    write_lines, preprocess, hf_tokenizer, corpus_bytes, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines("a.jsonl", [{"text": "plain"}] * 50 + [{"text": "strange"}])
    slow = preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--tokenizer-backend", "reference", out="slow/a")
    differ_on(monkeypatch, "strange")
    capsys.readouterr()
    prefix = preprocess(hf_tokenizer, "--input", lines, *FLAGS)
    assert "not gigatoken: it gives some texts other ids" in capsys.readouterr().err
    assert corpus_bytes(f"{prefix}_text_document") == corpus_bytes(f"{slow}_text_document")


def test_other_ids_later_on_stop_the_job(
    write_lines, preprocess, hf_tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A document of each batch is encoded by both; here the sample before the start misses what differs."""
    monkeypatch.setattr("data_tools.preprocessing.plan._sample", lambda *_: [])
    differ_on(monkeypatch, "strange")
    lines = write_lines("a.jsonl", [{"text": "strange"}])
    with pytest.raises(
        UserError, match="gigatoken gives a text other ids .*'strange'.* pass --tokenizer-backend reference"
    ):
        preprocess(hf_tokenizer, "--input", lines, *FLAGS)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_gigatoken_the_job_says_so_and_runs(
    write_lines, preprocess, hf_tokenizer, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    preprocess(hf_tokenizer, "--input", write_lines("a.jsonl", [{"text": "a"}]), *FLAGS)
    assert "not gigatoken: it is not installed (pip install 'moelpr[fast-tokenizer]')" in capsys.readouterr().err


def test_what_it_remembers_is_forgotten_when_memory_runs_short(
    jobs: dict[str, JobTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = GigatokenBackend(str(jobs["hf"].source), jobs["hf"].reference())
    limit = backends._CACHE_BYTES
    # The third is too much; what is left after forgetting, most of it, is what the next ones are measured by.
    sizes = iter([0, limit, limit + 1, limit - 1, 2 * limit - 1, 2 * limit])
    monkeypatch.setattr(backends, "_resident_bytes", lambda: next(sizes))
    seen = []
    for _ in range(4):
        assert backend.encode(["turn on the light"]).ids.size
        seen.append(backend._tokenizer)
    assert seen[0] is seen[1] and seen[1] is not seen[2] and seen[2] is seen[3]


def test_the_end_of_document_token_can_be_named(hf_tokenizer: Path, write_lines, preprocess, corpus_bytes) -> None:
    lines = write_lines("a.jsonl", [{"text": "a"}])
    prefix = preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--eod-token", "<|endoftext|>")
    ids = np.frombuffer(corpus_bytes(f"{prefix}_text_document")[0], np.uint16)
    assert ids[-1] == json.loads((hf_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(
        UserError, match=r"has no token <\|endoftexts\|> for --eod-token; similar ones are <\|endoftext\|>"
    ):
        preprocess(hf_tokenizer, "--input", lines, *FLAGS, "--eod-token", "<|endoftexts|>", out="other/a")
