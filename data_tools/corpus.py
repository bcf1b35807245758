"""A tokenized corpus: `<prefix>.bin` and `.idx` in Megatron's format, `.lang` in ours, opened and checked together."""

import os
import struct
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from moelpr.data.language_bits import LanguageBits, language_bits_path, open_language_bits
from moelpr.errors import UserError

_REMEDY = "rebuild the corpus with data_tools/preprocess_data.py"


class CorpusPaths(NamedTuple):
    """The three files of a corpus prefix."""

    bin: Path
    idx: Path
    lang: Path

    @classmethod
    def of(cls, prefix: str | os.PathLike[str]) -> Self:
        prefix = os.fspath(prefix)
        return cls(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), language_bits_path(prefix))


def shard_prefix(prefix: str | os.PathLike[str], shard: int, num_shards: int) -> str:
    """Where one of the jobs that share a corpus puts its part."""
    return f"{os.fspath(prefix)}.shard-{shard:05d}-of-{num_shards:05d}"


class Corpus:
    """A corpus opened for reading, its three files compared with each other.

    Attributes:
        tokens: memory-mapped token ids [tokens].
        bits: the language bits.
        sequence_lengths: [sequences] tokens; sequences follow each other in `tokens`.
        document_starts: [documents + 1], index of each document's first sequence, and the number of sequences.

    Raises:
        UserError: a file is missing or damaged, or two of them don't belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.paths = CorpusPaths.of(prefix)
        missing = [str(path) for path in self.paths[:2] if not path.exists()]
        if missing:
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
                f"give a corpus prefix, the path without .bin, .idx or .lang"
            )
        dtype = self._read_index()
        num_tokens = int(self.sequence_lengths.sum(dtype=np.int64))
        bin_bytes, expected_bytes = self.paths.bin.stat().st_size, num_tokens * dtype.itemsize
        if bin_bytes != expected_bytes:
            raise UserError(
                f"{self.paths.bin} holds {bin_bytes:,} bytes but {self.paths.idx} describes {expected_bytes:,} "
                f"({num_tokens:,} tokens of {dtype.itemsize} bytes); {_REMEDY}"
            )
        self.tokens = np.memmap(self.paths.bin, dtype, "r") if num_tokens else np.zeros(0, dtype)
        self.bits: LanguageBits = open_language_bits(prefix, num_tokens)
        # Where a sequence or a document begins, in tokens.
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sequence_lengths, dtype=np.int64)])
        if not np.array_equal(self._sequence_pointers, ends[:-1] * dtype.itemsize):
            raise UserError(f"{self.paths.idx} is damaged: its sequences do not follow each other; {_REMEDY}")
        self._document_offsets = ends[self.document_starts]

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document: [documents]."""
        return np.diff(self._document_offsets)

    def document(self, index: int) -> tuple[NDArray[np.number], NDArray[np.uint8]]:
        """Token ids and language bits of one document: [tokens] each."""
        start, stop = int(self._document_offsets[index]), int(self._document_offsets[index + 1])
        return self.tokens[start:stop], self.bits.slice(start, stop)

    def _read_index(self) -> np.dtype:
        # Megatron's reader trusts the file and takes seconds to import; here the file is what is under test.
        index = self.paths.idx.read_bytes()
        header = struct.Struct("<9sQBQQ")
        dtypes = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
        damaged = UserError(f"{self.paths.idx} is no whole Megatron .idx file; {_REMEDY}")
        if len(index) < header.size:
            raise damaged
        magic, version, code, num_sequences, num_starts = header.unpack_from(index)
        if magic != b"MMIDIDX\0\0" or version != 1 or code not in dtypes:
            raise damaged
        if len(index) != header.size + 12 * num_sequences + 8 * num_starts:
            raise damaged
        lengths_stop, pointers_stop = header.size + 4 * num_sequences, header.size + 12 * num_sequences
        self.sequence_lengths = np.frombuffer(index[header.size : lengths_stop], "<i4")
        self._sequence_pointers = np.frombuffer(index[lengths_stop:pointers_stop], "<i8")
        self.document_starts = np.frombuffer(index[pointers_stop:], "<i8")
        starts = self.document_starts
        if (
            not num_starts
            or starts[0] != 0
            or starts[-1] != num_sequences
            or (np.diff(starts) < 0).any()
            or (self.sequence_lengths < 0).any()
        ):
            raise damaged
        return np.dtype(dtypes[code]).newbyteorder("<")
