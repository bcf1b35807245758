"""A tokenized corpus: `<prefix>.bin` and `.idx` in Megatron's format, `.lang` in ours, written and checked together."""

import contextlib
import logging
import os
import shutil
import struct
import warnings
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from moelpr.data.language_bits import LanguageBits, LanguageBitsWriter, language_bits_path, open_language_bits
from moelpr.errors import UserError
from moelpr.files import fsync_file, refuse_existing, temporary_name

_BITS_AT_ONCE = 1 << 20
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


class CorpusWriter:
    """Writes a corpus under temporary names; `commit` gives the three files their own. Used as a context manager, it
    removes what was not committed.

    Args:
        prefix: the corpus's path without .bin/.idx/.lang; its folder is made where missing.
        vocab_size: number of token ids; decides the .bin's type as Megatron does (uint16 below 65,500, else int32).
        overwrite: whether `commit` may replace an existing corpus.

    Raises:
        UserError: the corpus exists and `overwrite` is not set, or its folder can't be made.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int, overwrite: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self.paths = CorpusPaths.of(prefix)
        refuse_existing(list(self.paths), overwrite)
        make_folder(self.paths.bin.parent)
        # Megatron's own builder writes .bin and .idx: identical bytes by construction. The import takes seconds and
        # complains of accelerated libraries that writing files has no use for.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.vocab_size = vocab_size
        self.dtype: type[np.integer] = DType.optimal_dtype(vocab_size)
        self._temporary = CorpusPaths(*map(temporary_name, self.paths))
        self._builder = IndexedDatasetBuilder(str(self._temporary.bin), dtype=self.dtype)
        self._bits = LanguageBitsWriter(self._temporary.lang)
        self.num_documents = 0

    @property
    def num_tokens(self) -> int:
        return self._bits.num_tokens

    @property
    def num_original(self) -> int:
        return self._bits.num_original

    def add_document(self, ids: NDArray[np.int32], is_original: bool) -> None:
        """Add one document: token ids [tokens] that share one language bit. No tokens: a document without a sequence.

        Raises:
            UserError: an id that the .bin's type can't hold.
        """
        if len(ids) and int(ids.max()) > np.iinfo(self.dtype).max:
            raise UserError(
                f"the token id {int(ids.max()):,} does not fit the {np.dtype(self.dtype).name} that a vocabulary of "
                f"{self.vocab_size:,} is stored in; the tokenizer counts its own vocabulary wrongly"
            )
        self._builder.add_document(ids, [len(ids)] if len(ids) else [])
        self._bits.append_run(is_original, len(ids))
        self.num_documents += 1

    def add_corpus(self, corpus: "Corpus") -> None:
        """Add another corpus as it is, with memory for its index and 1 MiB of bits.

        Raises:
            UserError: its token ids are of another type, so it is from another tokenizer.
        """
        if corpus.tokens.dtype != np.dtype(self.dtype):
            raise UserError(
                f"{corpus.paths.bin} holds {corpus.tokens.dtype.name}, the corpora before it "
                f"{np.dtype(self.dtype).name}; merge corpora of one tokenizer"
            )
        self._builder.add_index(corpus.prefix)
        for start in range(0, len(corpus.bits), _BITS_AT_ONCE):
            self._bits.append(corpus.bits.slice(start, min(start + _BITS_AT_ONCE, len(corpus.bits))))
        self.num_documents += corpus.num_documents

    def finalize(self) -> None:
        """Complete the three files under their temporary names and bring them to the disk."""
        self._builder.finalize(str(self._temporary.idx))
        self._bits.finalize()
        for file in self._temporary:
            fsync_file(file)

    def commit(self) -> None:
        """Give the finished files their names."""
        # The .idx goes last, and an old one goes first: every reader opens it before the others, so whatever interrupts
        # these lines leaves a corpus that is whole or one that nothing opens.
        self.paths.idx.unlink(missing_ok=True)
        # Megatron keeps its sample indices beside the corpus and knows them by name and length, not by content.
        shutil.rmtree(self.paths.bin.with_suffix("") / "cache", ignore_errors=True)
        os.replace(self._temporary.bin, self.paths.bin)
        os.replace(self._temporary.lang, self.paths.lang)
        os.replace(self._temporary.idx, self.paths.idx)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing flushes; on a full disk that fails once more, and the first error is the one to tell.
        with contextlib.suppress(OSError):
            self._builder.data_file.close()
        with contextlib.suppress(OSError):
            self._bits.close()
        for file in self._temporary:
            file.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make an output folder, its parents included."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {folder} can't be made ({error.strerror}); choose another") from error


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
