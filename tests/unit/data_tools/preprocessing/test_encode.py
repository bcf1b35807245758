"""Every token of a text gets one bit, and the workers end with the job."""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.preprocessing.encode import Encoder, Text, encoding_pool
from data_tools.preprocessing.languages import Bits, LanguageSpans, TaggedText
from data_tools.preprocessing.summary import Tally
from data_tools.preprocessing.tokenizers import Encoded, HuggingFaceBackend, JobTokenizer, load_job_tokenizer


def spans(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"spans": [{"text": text, "lang": lang} for text, lang in pairs]}


@pytest.fixture(scope="module")
def job_tokenizer(hf_tokenizer: Path) -> JobTokenizer:
    return load_job_tokenizer("HuggingFaceTokenizer", str(hf_tokenizer), True, None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=12), st.sampled_from("ab")), max_size=6))
def test_any_spans_tag_every_token_once(pairs: list[tuple[str, str]], job_tokenizer: JobTokenizer) -> None:
    bits = Bits(frozenset("a"), frozenset())
    tagger = LanguageSpans("spans", bits)
    encoder = Encoder(
        HuggingFaceBackend(str(job_tokenizer.source), False), 500, [0], [], 1, tagger, bits, [["text"]], ["text"]
    )
    [text] = tagger.texts(spans(*pairs), 0, ["text"])
    tally = Tally()
    prepared = [Text(text), Text(TaggedText("x", [("b", 1)]))]
    documents = encoder.documents(prepared, "text", tally)
    assert isinstance(documents.tokens, np.ndarray)
    assert documents.run_lengths.sum() == len(documents.tokens) == documents.lengths.sum()
    assert (documents.run_lengths > 0).all() and (np.diff(documents.run_bits) != 0).all()
    assert sum(count.tokens for count in tally.corpus("text").languages.values()) == len(documents.tokens)
    whole = encoder.backend.encode(["".join(text for text, _ in pairs)]).ids
    assert documents.tokens[: documents.lengths[0]].tolist() == [0, *whole.tolist(), 1]


def test_added_tokens_are_where_the_tokenizer_puts_them() -> None:
    bits = Bits(frozenset(), frozenset())
    encoder = Encoder(None, 500, [7, 8], [9], 1, None, bits, [["text"]], ["text"])  # type: ignore[arg-type]
    wrapped = encoder._wrapped(Encoded(np.array([100, 101, 102], np.int32), np.array([2, 0, 1])))
    assert wrapped.ids.tolist() == [7, 8, 100, 101, 9, 1, 7, 8, 9, 1, 7, 8, 102, 9, 1]
    assert wrapped.lengths.tolist() == [6, 4, 5]
    encoder.prefix, encoder.suffix = [], []
    wrapped = encoder._wrapped(Encoded(np.array([100, 101, 102], np.int32), np.array([2, 0, 1])))
    assert wrapped.ids.tolist() == [100, 101, 1, 102, 1] and wrapped.lengths.tolist() == [3, 0, 2]


class SlowEncoder:
    def encode(self, batch: object, spool: Path) -> None:
        time.sleep(120)


def test_stopped_job_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    started = time.monotonic()
    other = multiprocessing.Process(target=time.sleep, args=(100,))  # not the pool's
    other.start()
    before = {child.pid for child in psutil.Process().children()}
    workers: list[psutil.Process] = []

    def batches() -> Iterator[Any]:
        yield from [SimpleNamespace()] * 4
        time.sleep(0.5)
        workers.extend(child for child in psutil.Process().children() if child.pid not in before)
        assert workers
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), encoding_pool(SlowEncoder(), 2, tmp_path) as encode:  # type: ignore[arg-type]
        next(encode(batches()))
    assert time.monotonic() - started < 60
    assert other.is_alive()
    other.kill()
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
