"""The tokenizer of a preprocessing job."""

import os
import sys
from difflib import get_close_matches
from multiprocessing import parent_process
from typing import NamedTuple

from data_tools.preprocessing.settings import TokenizerFlags
from data_tools.preprocessing.workers import load_in_process
from moelpr.base.command import check_is_utf8
from moelpr.base.errors import UserError, reports_panics
from moelpr.data.manifest import TokenizerRecord
from moelpr.data.tokenizers.base import Tokenizer
from moelpr.data.tokenizers.loading import load_tokenizer


class JobTokenizer(NamedTuple):
    """The tokenizer of a job, and the IDs around each text."""

    record: TokenizerRecord
    tokenizer: Tokenizer
    prefix: list[int]  # IDs to add before each text
    suffix: list[int]  # IDs to add after each text


def load_job_tokenizer(type: str, model: str, special_tokens: bool, eod_token: str | None) -> JobTokenizer:
    """Load a tokenizer.

    Raises:
        UserError: The tokenizer can't be loaded, or has no token `eod_token`.
    """
    return load_in_process(_load, type, model, special_tokens, eod_token)


def tokenizer_of(args: TokenizerFlags, append_eod: bool) -> JobTokenizer:
    """Load the tokenizer that flags name."""
    check_is_utf8(args.tokenizer_model, "tokenizer")
    special_tokens = not args.tokenizer_hf_no_include_special_tokens
    tokenizer = load_job_tokenizer(args.tokenizer_type, args.tokenizer_model, special_tokens, args.eod_token)
    if append_eod and tokenizer.record.eod_id is None:
        raise UserError(
            f"--append-eod requires an end-of-document token, but {args.tokenizer_model} has none; name one with "
            "--eod-token"
        )
    return tokenizer


def omit_torch() -> None:
    """Keep a worker from importing torch with transformers, which takes a second, and from a warning about it."""
    if "torch" not in sys.modules and parent_process() is not None:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


@reports_panics()
def _load(type: str, model: str, special_tokens: bool, eod_token: str | None) -> JobTokenizer:
    omit_torch()
    tokenizer = load_tokenizer(type, model, must_keep_text=True)
    eod_id = tokenizer.eod_id if eod_token is None else _id_of(eod_token, tokenizer.vocabulary())
    record = TokenizerRecord.of(type, model, tokenizer, eod_id, special_tokens)
    return JobTokenizer(record, tokenizer, *(tokenizer.around_text() if special_tokens else ([], [])))


def _id_of(eod_token: str, vocabulary: dict[str, int]) -> int:
    if eod_token not in vocabulary:
        near = get_close_matches(eod_token, [name for name in vocabulary if name[:1] in "<[|"], 3, 0.5)
        hint = f"; similar tokens are {', '.join(near)}" if near else ""
        raise UserError(f"--eod-token {eod_token} is not in the tokenizer's vocabulary{hint}")
    return vocabulary[eod_token]
