"""Documents, and the corpus that they become whatever file holds them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.preprocessing import job
from tests.unit.data_tools.conftest import documents

FLAGS = ("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod")


@pytest.fixture
def plain(write_lines: Callable[..., Path]) -> Path:
    """Documents as JSON lines."""
    return write_lines("plain.jsonl", documents(61))


@pytest.fixture
def expected(plain: Path, preprocess: Callable) -> list[bytes]:
    """The corpus of these lines."""
    content: list[bytes] = preprocess("--input", plain, *FLAGS, out="plain/a").content()
    return content


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
