"""The tokenizer of a preprocessing job, loaded without what loading it drags in."""

import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from data_tools.preprocessing.backends import Backend, HuggingFaceBackend, SentencePieceBackend, SlowHuggingFaceBackend
from moelpr.data.manifest import TokenizerRecord
from moelpr.data.tokenizer import Tokenizer, load_tokenizer
from moelpr.errors import UserError


@dataclass
class JobTokenizer:
    """All of a tokenizer that a job needs.

    Attributes:
        record: for the manifest.
        source: a tokenizer.json's content, or a .model file's; None: the tokenizer is neither.
        slow: the tokenizer where `source` is None.
        prefix: ids put before each text.
        suffix: ids put behind it.
    """

    record: TokenizerRecord
    source: str | bytes | None
    slow: Any
    splits_special_tokens: bool
    prefix: list[int]
    suffix: list[int]

    def reference(self) -> Backend:
        """The library that the tokenizer is made for."""
        if isinstance(self.source, str):
            return HuggingFaceBackend(self.source, self.splits_special_tokens)
        if isinstance(self.source, bytes):
            return SentencePieceBackend(self.source)
        return SlowHuggingFaceBackend(self.slow)


def load_job_tokenizer(type: str, model: str, special_tokens: bool, eod_token: str | None) -> JobTokenizer:
    """Load a tokenizer in a process of its own: what transformers brings along, no worker needs.

    Raises:
        UserError: it can't be loaded, or has no token `eod_token`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which the child doesn't use
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            try:
                return pool.submit(_load, type, model, special_tokens, eod_token).result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"the process that loads the tokenizer {model} was killed, most likely for want of memory"
                ) from error


def _load(type: str, model: str, special_tokens: bool, eod_token: str | None) -> JobTokenizer:
    if "torch" not in sys.modules:
        # transformers imports torch wherever it is, which takes a second; a tokenizer needs none of it.
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # and doesn't have to say so
    tokenizer = load_tokenizer(type, model, special_tokens)
    eod_id = tokenizer.eod_id if eod_token is None else _id_of(eod_token, tokenizer.vocabulary())
    record = TokenizerRecord.of(type, model, tokenizer, eod_id, special_tokens)
    source = tokenizer.serialized()
    prefix, suffix = _around(tokenizer, model)
    slow = getattr(tokenizer, "_tokenizer", None) if source is None else None
    return JobTokenizer(record, source, slow, tokenizer.splits_special_tokens, prefix, suffix)


def _id_of(token: str, vocabulary: dict[str, int]) -> int:
    if token in vocabulary:
        return vocabulary[token]
    near = get_close_matches(token, [name for name in vocabulary if name[:1] in "<[|"], 3, 0.5)
    hint = f"; similar ones are {', '.join(near)}" if near else ""
    raise UserError(f"the tokenizer has no token {token} for --eod-token{hint}")


def _around(tokenizer: Tokenizer, model: str) -> tuple[list[int], list[int]]:
    """The ids a tokenizer puts before and behind each text."""
    [around] = tokenizer.encode_batch([""])
    [inside], [whole] = tokenizer.encode_batch(["x"], False), tokenizer.encode_batch(["x"])
    for length in range(len(around) + 1):
        if whole == [*around[:length], *inside, *around[length:]]:
            return around[:length], around[length:]
    raise UserError(
        f"the tokenizer {model} puts other tokens around some texts than around others; "
        f"pass --tokenizer-hf-no-include-special-tokens"
    )
