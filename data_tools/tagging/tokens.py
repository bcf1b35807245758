"""Whether a tokenizer fits the tokens of a corpus that another program wrote; they are read once, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.corpus.corpus import CorpusPaths
from data_tools.corpus.tokenized import token_dtype
from data_tools.preprocessing.job_tokenizer import JobTokenizer
from moelpr.base.errors import UserError
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.manifest import BLOCK_BYTES, FileRecord

_DOCUMENTS_AT_ONCE = 1 << 10
# Texts that are tokenized again, each up to this many tokens; the last ones of a text that is cut may differ.
_TEXTS, _TEXT_TOKENS, _CUT_TOKENS = 64, 512, 8
_OTHER = "pass the tokenizer that the corpus was made with"


def document_lengths(index: CorpusIndex) -> Iterator[NDArray[np.int64]]:
    """Yield the tokens of each document, int64 [documents], a thousand at once."""
    for first in range(0, len(index.document_starts) - 1, _DOCUMENTS_AT_ONCE):
        starts = index.document_starts[first : first + _DOCUMENTS_AT_ONCE + 1]
        lengths = index.sequence_lengths[starts[0] : starts[-1]]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        yield np.diff(offsets[starts - starts[0]])


class _Picked:
    """Counts the token IDs at ascending positions while a corpus is read.

    Attributes:
        counts: How often each ID was found, int64 [vocabulary].
    """

    def __init__(self, positions: Iterator[NDArray[np.int64]], vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, np.int64)
        self._positions, self._pending = positions, np.zeros(0, np.int64)

    def read(self, tokens: NDArray[np.integer], first: int) -> None:
        """Count in the next block, whose first token has position `first`."""
        stop = first + len(tokens)
        while (not len(self._pending) or self._pending[-1] < stop) and (
            more := next(self._positions, None)
        ) is not None:
            self._pending = np.concatenate([self._pending, more])
        cut = int(np.searchsorted(self._pending, stop))
        self.counts += np.bincount(tokens[self._pending[:cut] - first], minlength=len(self.counts))
        self._pending = self._pending[cut:]


@dataclass(frozen=True)
class TokensFound:
    """What a corpus's .bin contains.

    Attributes:
        record: Its size and checksums.
        firsts: How many documents begin with each token ID, int64 [vocabulary]; empty ones are not counted.
        lasts: How many end with each, likewise.
    """

    record: FileRecord
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]


def check_dtype(prefix: str, index: CorpusIndex, tokenizer: JobTokenizer) -> None:
    """Raise `UserError` if Megatron would have chosen another dtype for this tokenizer."""
    vocab_size, model = tokenizer.record.vocab_size, tokenizer.record.model
    if index.dtype != (expected := token_dtype(vocab_size)):
        raise UserError(
            f"{prefix}.idx describes {index.dtype.name} tokens, but Megatron writes {expected.name} for the "
            f"{vocab_size:,} IDs of {model}; {_OTHER}"
        )


def read_tokens(prefix: str, index: CorpusIndex, tokenizer: JobTokenizer) -> TokensFound:
    """Read the .bin.

    Raises:
        UserError: It contains IDs that the tokenizer does not have.
    """
    path, vocab_size = CorpusPaths.of(prefix).bin, tokenizer.record.vocab_size
    firsts, lasts = (_Picked(_positions(index, is_last), vocab_size) for is_last in (False, True))

    def blocks() -> Iterator[bytes]:
        first = 0
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                tokens = np.frombuffer(block, index.dtype, len(block) // index.dtype.itemsize)
                if (low := int(tokens.min())) < 0 or (high := int(tokens.max())) >= vocab_size:
                    raise UserError(
                        f"{path} contains the token ID {low if low < 0 else high:,}, but {tokenizer.record.model} has "
                        f"the IDs 0 to {vocab_size - 1:,}; {_OTHER}"
                    )
                firsts.read(tokens, first)
                lasts.read(tokens, first)
                first += len(tokens)
                yield block

    size = index.num_tokens * index.dtype.itemsize
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
        record = FileRecord.of_blocks(blocks(), bar.update)
    if record.bytes != size:
        raise UserError(f"{path} was changed while it was read; run the command again when it is complete")
    return TokensFound(record, firsts.counts, lasts.counts)


def _positions(index: CorpusIndex, is_last: bool) -> Iterator[NDArray[np.int64]]:
    """Yield the position of the first or the last token of each document that has tokens."""
    before = 0
    for lengths in document_lengths(index):
        stops = before + np.cumsum(lengths)
        yield (stops - 1 if is_last else stops - lengths)[lengths > 0]
        before = int(stops[-1])


def check_begins(prefix: str, found: TokensFound, tokenizer: JobTokenizer) -> None:
    """Raise `UserError` if documents do not begin as this tokenizer begins a text."""
    if not tokenizer.prefix:
        return
    first, total = tokenizer.prefix[0], int(found.firsts.sum())
    if missing := total - int(found.firsts[first]):
        raise UserError(
            f"{missing:,} of {total:,} documents of {prefix} do not begin with {_named(first, tokenizer)}, which "
            f"{tokenizer.record.model} adds to each text; pass --tokenizer-hf-no-include-special-tokens if they were "
            "tokenized without it, or the right tokenizer"
        )


def check_ends(prefix: str, found: TokensFound, tokenizer: JobTokenizer) -> None:
    """Raise `UserError` unless every document ends with the end-of-document token."""
    eod_id, total = tokenizer.record.eod_id, int(found.lasts.sum())
    assert eod_id is not None
    if missing := total - int(found.lasts[eod_id]):
        most = int(found.lasts.argmax())
        often = f"; {int(found.lasts[most]):,} end with {_named(most, tokenizer)}" if most != eod_id else ""
        raise UserError(
            f"{missing:,} of {total:,} documents of {prefix} do not end with the end-of-document token "
            f"{_named(eod_id, tokenizer)}{often}; name the right one with --eod-token, or pass --no-append-eod if the "
            "corpus was made without"
        )


def _named(id: int, tokenizer: JobTokenizer) -> str:
    return f"{id} ({tokenizer.tokenizer.decode([id])!r})"


def reproduced(prefix: str, index: CorpusIndex, tokenizer: JobTokenizer) -> tuple[int, int]:
    """Tokenize the text of the first documents again.

    Returns:
        How many of them give the same tokens, and how many were tried.
    """
    same, tried, start = 0, 0, 0
    tokens = np.memmap(CorpusPaths.of(prefix).bin, index.dtype, "r")
    for length in index.sequence_lengths[:_TEXTS].tolist():
        ids = tokens[start : start + min(length, _TEXT_TOKENS)].tolist()
        start += length
        is_cut = length > _TEXT_TOKENS
        after = [] if is_cut else [*tokenizer.suffix, tokenizer.record.eod_id]
        for id in [*reversed(after)]:
            ids = ids[:-1] if ids[-1:] == [id] else ids
        if ids[: len(tokenizer.prefix)] == tokenizer.prefix:
            ids = ids[len(tokenizer.prefix) :]
        if ids:
            again = tokenizer.tokenizer.encode([tokenizer.tokenizer.decode(ids)]).ids.tolist()
            same += again[: len(ids) - _CUT_TOKENS] == ids[:-_CUT_TOKENS] if is_cut else again == ids
            tried += 1
    return same, tried
