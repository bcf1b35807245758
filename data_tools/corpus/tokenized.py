"""Tokenized documents with their language bits, on their way into a corpus."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moelpr.base.errors import UserError


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of a .bin's token IDs: Megatron's rule (`DType.optimal_dtype`)."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def as_tokens(ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.integer]:
    """Convert IDs [tokens] to the dtype of a .bin with this vocabulary size.

    Raises:
        UserError: An ID is too large for the dtype.
    """
    dtype = token_dtype(vocab_size)
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise UserError(
            f"the token ID {int(ids.max()):,} does not fit {dtype.name}, the dtype for a vocabulary of {vocab_size:,}; "
            "the tokenizer reports a wrong vocabulary size"
        )
    return ids.astype(dtype, copy=False)


class Documents(NamedTuple):
    """Tokenized documents, concatenated."""

    tokens: NDArray[np.integer]  # the tokens in the .bin's dtype [tokens]
    lengths: NDArray[np.int64]  # tokens of each document, int64 [documents]
    runs: NDArray[np.int64]  # runs of tokens with one language bit, int64 [runs]: 2 × tokens of the run + its bit
    json_lines: bytes = b""  # the text of held-out documents as JSON lines; empty for all others
    # the same for the tokens of conversations that count in the loss
    loss_runs: NDArray[np.int64] = np.zeros(0, np.int64)


def joined(groups: list[Documents]) -> Documents:
    """Concatenate documents."""
    tokens, lengths, runs, json_lines, loss_runs = zip(*groups, strict=True)
    parts = np.concatenate(tokens), np.concatenate(lengths), np.concatenate(runs)
    return Documents(*parts, b"".join(json_lines), np.concatenate(loss_runs))


def run_edges(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return where runs of equal bits start, and the number of bits: [runs + 1]."""
    if not len(bits):
        return np.zeros(1, np.int64)
    return np.concatenate([[0], np.flatnonzero(np.diff(bits)) + 1, [len(bits)]])


def runs_of(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the runs of bits [tokens]."""
    edges = run_edges(bits)
    return np.diff(edges) << 1 | bits[edges[:-1]]


def joined_runs(bits: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the runs of spans with these bits and lengths [spans]; neighbors with equal bits are one run."""
    firsts = run_edges(bits)[:-1]
    return np.add.reduceat(lengths, firsts) << 1 | bits[firsts]
