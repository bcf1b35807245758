"""Documents, and the corpus that they become whatever file holds them."""

from typing import Any

import pytest

from data_tools.preprocessing import job


@pytest.fixture
def rows(sentences: dict[str, str]) -> list[dict[str, Any]]:
    names = list(sentences)
    return [{"text": " ".join([sentences[names[i % 5]]] * (i % 4)), "n": i, "lang": names[i % 5]} for i in range(61)]


@pytest.fixture
def expected(rows, write_lines, preprocess, hf_tokenizer, corpus_bytes) -> list[bytes]:
    """The corpus of the rows as plain JSON lines."""
    path = write_lines("plain.jsonl", rows)
    flags = ("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod")
    return corpus_bytes(f"{preprocess(hf_tokenizer, '--input', path, *flags, out='plain/a')}_text_document")


def spans(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"spans": [{"text": text, "lang": lang} for text, lang in pairs]}


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: type[BaseException]) -> None:
    """Let a job end after so many batches, as Ctrl-C or a broken line ends it."""
    write = job.Job._write_batch
    written = 0

    def write_some(*arguments: Any) -> None:
        nonlocal written
        if written == batches:
            raise error("stopped")
        written += 1
        write(*arguments)

    monkeypatch.setattr(job.Job, "_write_batch", write_some)
