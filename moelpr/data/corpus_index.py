"""Megatron's .idx, memory-mapped, with every number checked.

Megatron's own reader does not check: a damaged file leads to a traceback, or to tokens of another document.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moelpr.base.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
REBUILD = "rebuild the corpus with moelpr data preprocess"
_AT_ONCE = 1 << 20  # sequences or documents checked at once, so that memory stays small


@dataclass(frozen=True)
class CorpusIndex:
    """Where the sequences and documents of a corpus are in its .bin."""

    dtype: np.dtype  # the dtype of the token IDs
    sequence_lengths: NDArray[np.int32]  # tokens of each sequence, int32 [sequences]; sequences are contiguous
    # each document's first sequence, and their number in the end, int64 [documents + 1]
    document_starts: NDArray[np.int64]
    num_tokens: int

    @classmethod
    def open(cls, prefix: str | os.PathLike[str]) -> Self:
        """Open the .idx of a corpus prefix and check it against itself and the size of the .bin."""
        idx, bin_file = Path(f"{os.fspath(prefix)}.idx"), Path(f"{os.fspath(prefix)}.bin")
        if missing := [str(path) for path in (bin_file, idx) if not path.is_file()]:
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
                "pass a corpus prefix, the path without .bin, .idx or .lang"
            )
        try:
            content = np.memmap(idx, np.uint8, "r") if idx.stat().st_size else np.zeros(0, np.uint8)
            bin_file.open("rb").close()
        except OSError as error:
            raise UserError(f"{error.filename} can't be opened ({error.strerror}); check its permissions") from error
        dtype, lengths, pointers, starts = _arrays(idx, content)
        num_tokens = _check_sequences(idx, lengths, pointers, dtype.itemsize)
        bin_bytes, expected_bytes = bin_file.stat().st_size, num_tokens * dtype.itemsize
        if bin_bytes != expected_bytes:
            raise UserError(
                f"{bin_file} contains {bin_bytes:,} bytes, but {idx} describes {expected_bytes:,} "
                f"({num_tokens:,} tokens of {dtype.itemsize} bytes); {REBUILD}"
            )
        return cls(dtype, lengths, starts, num_tokens)


def index_header(dtype: np.dtype, sequences: int, documents: int) -> bytes:
    """Return the header of an .idx."""
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    return _HEADER.pack(_MAGIC, _VERSION, code, sequences, documents + 1)


def _arrays(idx: Path, content: NDArray[np.uint8]) -> tuple[np.dtype, NDArray, NDArray, NDArray]:
    """Return dtype of the token IDs, sequence lengths, sequence pointers and document starts."""
    damaged = UserError(f"{idx} is not a complete Megatron .idx file; {REBUILD}")
    if len(content) < _HEADER.size:
        raise damaged
    magic, version, code, sequences, starts = _HEADER.unpack_from(content)
    is_known = (magic, version) == (_MAGIC, _VERSION) and code in _DTYPES
    if not is_known or not starts or len(content) != _HEADER.size + 12 * sequences + 8 * starts:
        raise damaged
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    document_starts = np.frombuffer(content, "<i8", starts, _HEADER.size + 12 * sequences)
    pieces = (document_starts[first : first + _AT_ONCE + 1] for first in range(0, starts, _AT_ONCE))
    is_ascending = all((piece[:-1] <= piece[1:]).all() for piece in pieces)
    if document_starts[0] != 0 or document_starts[-1] != sequences or not is_ascending:
        raise damaged
    return np.dtype(_DTYPES[code]).newbyteorder("<"), lengths, pointers, document_starts


def _check_sequences(idx: Path, lengths: NDArray, pointers: NDArray, token_bytes: int) -> int:
    """Return the number of tokens; each sequence must begin where the previous one ends."""
    num_tokens = 0
    for first in range(0, len(lengths), _AT_ONCE):
        piece = lengths[first : first + _AT_ONCE].astype(np.int64)
        ends = num_tokens + np.cumsum(piece)
        if (piece < 0).any() or not np.array_equal(pointers[first : first + _AT_ONCE], (ends - piece) * token_bytes):
            raise UserError(f"{idx} is damaged: its sequences are not contiguous; {REBUILD}")
        num_tokens = int(ends[-1])
    return num_tokens
