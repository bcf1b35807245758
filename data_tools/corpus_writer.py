"""Writing a corpus: .bin and .idx in Megatron's format and .lang in ours, with memory that does not grow with it."""

import hashlib
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus import Corpus, CorpusPaths
from moelpr.data.language_bits import LanguageBitsWriter
from moelpr.data.manifest import FileRecord, Manifest, manifest_path
from moelpr.errors import UserError
from moelpr.files import fsync_file, refuse_existing, temporary_name

_CHUNK = 1 << 16  # items of an index held in memory at once
_BITS_AT_ONCE = 1 << 20
_LONGEST_SEQUENCE = np.iinfo(np.int32).max
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[np.dtype, int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a .bin's ids: Megatron's rule (`DType.optimal_dtype`)."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def as_tokens(ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.integer]:
    """Ids [tokens] in the type a .bin of this vocabulary has.

    Raises:
        UserError: an id that the type can't hold.
    """
    dtype = token_dtype(vocab_size)
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise UserError(
            f"the token id {int(ids.max()):,} does not fit the {dtype.name} that a vocabulary of {vocab_size:,} is "
            f"stored in; the tokenizer counts its own vocabulary wrongly"
        )
    return ids.astype(dtype, copy=False)


@dataclass(frozen=True)
class TokensAt:
    """Tokens in a file of their own, in the .bin's type, which go when they are written."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count


class Documents(NamedTuple):
    """Tokenized documents, one after another.

    Attributes:
        tokens: [tokens], in the .bin's type, or where they are.
        lengths: tokens of each document: int64 [documents].
        run_bits: the language bits as runs, 1 = original: uint8 [runs].
        run_lengths: tokens of each run: int64 [runs]; they add up to the number of tokens.
    """

    tokens: NDArray[np.integer] | TokensAt
    lengths: NDArray[np.int64]
    run_bits: NDArray[np.uint8]
    run_lengths: NDArray[np.int64]


class Position(NamedTuple):
    """How much of a corpus is written."""

    tokens: int = 0
    original: int = 0
    sequences: int = 0
    documents: int = 0
    runs: int = 0


class CorpusWriter:
    """Writes a corpus in a folder of its own; `commit` gives the files their names. Used as a context manager, it
    removes what was not committed.

    Four files grow while documents come in: the .bin itself, lengths of sequences, ends of documents (in sequences) and
    runs of language bits. `finalize` makes .idx and .lang of the last three.

    Args:
        prefix: the corpus's path without .bin/.idx/.lang; its folder is made where missing.
        vocab_size: number of token ids; decides the .bin's type as Megatron does (uint16 below 65,500, else int32).
        overwrite: whether `commit` may replace an existing corpus.
        folder: where to keep unfinished files, on the corpus's file system; given one, the writer leaves it as it is.
        position: how much of the unfinished files in `folder` to keep: what `flush` returned, perhaps to a process
            that was killed since.

    Raises:
        UserError: the corpus exists and `overwrite` is not set, its folder can't be made, or the unfinished files hold
            less than `position` says.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        vocab_size: int,
        overwrite: bool = False,
        folder: Path | None = None,
        position: Position | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.paths = CorpusPaths.of(prefix)
        refuse_existing(list(self.paths), overwrite)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._removes_folder = folder is None
        self._folder = folder or temporary_name(Path(self.prefix))
        make_folder(self._folder)
        name = Path(self.prefix).name
        self._unfinished = CorpusPaths.of(self._folder / name)
        self._parts = [self._folder / f"{name}.{part}" for part in ("bin", "lengths", "ends", "runs")]
        self._files: list[BinaryIO] = [open(path, "ab") for path in self._parts]
        self._at = position or Position()
        self._cut_unfinished()

    @property
    def num_tokens(self) -> int:
        return self._at.tokens

    @property
    def num_original(self) -> int:
        return self._at.original

    @property
    def num_documents(self) -> int:
        return self._at.documents

    def flush(self) -> Position:
        """Bring everything to the disk; the position that it is complete up to."""
        for file in self._files:
            if not file.closed:  # by finalize, which has brought them to the disk
                file.flush()
                os.fsync(file.fileno())
        return self._at

    def add(self, documents: Documents) -> None:
        """Add documents.

        Raises:
            UserError: one is longer than Megatron's format can say.
        """
        lengths = documents.lengths
        if len(lengths) and lengths.max() > _LONGEST_SEQUENCE:
            raise UserError(
                f"a document of {int(lengths.max()):,} tokens is longer than Megatron's .idx can say "
                f"({_LONGEST_SEQUENCE:,}); split it"
            )
        has_tokens = lengths > 0  # a document without tokens is one without a sequence, as in Megatron
        ends = self._at.sequences + np.cumsum(has_tokens, dtype="<i8")
        runs = (documents.run_lengths << 1 | documents.run_bits).astype("<i8")
        if isinstance(documents.tokens, TokensAt):
            _copy(documents.tokens.path, self._files[0])
            documents.tokens.path.unlink()
        else:
            self._files[0].write(documents.tokens.tobytes())
        for file, part in zip(self._files[1:], (lengths[has_tokens].astype("<i4"), ends, runs), strict=True):
            file.write(part.tobytes())
        self._at = Position(
            self._at.tokens + len(documents.tokens),
            self._at.original + int(documents.run_lengths[documents.run_bits == 1].sum()),
            self._at.sequences + int(has_tokens.sum()),
            self._at.documents + len(lengths),
            self._at.runs + len(runs),
        )

    def add_document(self, ids: NDArray[np.integer], is_original: bool) -> None:
        """Add one document: token ids [tokens] that share one language bit. No tokens: a document without a sequence.

        Raises:
            UserError: an id that the .bin's type can't hold.
        """
        length = np.array([len(ids)], np.int64)
        self.add(Documents(as_tokens(ids, self.vocab_size), length, np.array([is_original], np.uint8), length))

    def add_corpus(self, corpus: Corpus) -> None:
        """Add another corpus as it is.

        Raises:
            UserError: its token ids are of another type, so it is from another tokenizer.
        """
        if corpus.tokens.dtype != self.dtype:
            raise UserError(
                f"{corpus.paths.bin} holds {corpus.tokens.dtype.name}, the corpora before it "
                f"{self.dtype.name}; merge corpora of one tokenizer"
            )
        tokens, lengths, ends, runs = self._files
        with open(corpus.paths.bin, "rb") as source:
            shutil.copyfileobj(source, tokens)
        lengths.write(corpus.sequence_lengths.astype("<i4").tobytes())
        ends.write((corpus.document_starts[1:] + self._at.sequences).astype("<i8").tobytes())
        num_runs = 0
        for start in range(0, len(corpus.bits), _BITS_AT_ONCE):
            bits = corpus.bits.slice(start, min(start + _BITS_AT_ONCE, len(corpus.bits)))
            edges = np.concatenate([[0], np.flatnonzero(np.diff(bits)) + 1, [len(bits)]])
            runs.write((np.diff(edges) << 1 | bits[edges[:-1]]).astype("<i8").tobytes())
            num_runs += len(edges) - 1
        self._at = Position(
            self._at.tokens + len(corpus.tokens),
            self._at.original + corpus.bits.num_original,
            self._at.sequences + len(corpus.sequence_lengths),
            self._at.documents + corpus.num_documents,
            self._at.runs + num_runs,
        )

    def finalize(self) -> dict[str, FileRecord]:
        """Complete the three files in their folder and bring them to the disk: their sizes and checksums."""
        for file in self._files:
            file.close()
        self._write_index()
        self._write_bits()
        records = {}
        for path in self._unfinished:
            fsync_file(path)
            with open(path, "rb") as content:
                checksum = hashlib.file_digest(content, "sha256").hexdigest()
            records[path.suffix[1:]] = FileRecord(path.stat().st_size, checksum)
        return records

    def commit(self, manifest: Manifest | None = None) -> None:
        """Give the finished files their names, with the manifest that describes them."""
        commit_corpus(self.prefix, self._folder, manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            try:
                file.close()
            except OSError:
                pass  # closing flushes; on a full disk that fails once more, and the first error is the one to tell
        if self._removes_folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _cut_unfinished(self) -> None:
        at = self._at
        sizes = (at.tokens * self.dtype.itemsize, 4 * at.sequences, 8 * at.documents, 8 * at.runs)
        for file, path, wanted in zip(self._files, self._parts, sizes, strict=True):
            found = path.stat().st_size
            if found < wanted:
                raise UserError(f"{path} has lost its end, so the run can't be resumed; remove its folder")
            if found > wanted:
                file.truncate(wanted)

    def _write_index(self) -> None:
        _, lengths, ends, _ = self._parts
        with open(self._unfinished.idx, "wb") as index:
            code = _DTYPE_CODES[self.dtype]
            index.write(_INDEX_HEADER.pack(b"MMIDIDX\0\0", 1, code, self._at.sequences, self._at.documents + 1))
            _copy(lengths, index)
            start = 0
            with open(lengths, "rb") as file:
                while len(chunk := np.fromfile(file, "<i4", _CHUNK)):
                    stops = start + np.cumsum(chunk, dtype=np.int64)
                    index.write(((stops - chunk) * self.dtype.itemsize).astype("<i8").tobytes())
                    start = int(stops[-1])
            index.write(bytes(8))  # the first document begins at sequence 0
            _copy(ends, index)

    def _write_bits(self) -> None:
        with LanguageBitsWriter(self._unfinished.lang) as writer, open(self._parts[3], "rb") as runs:
            while len(chunk := np.fromfile(runs, "<i8", _CHUNK)):
                bits, counts = (chunk & 1).astype(np.uint8), chunk >> 1
                if counts.sum() <= _BITS_AT_ONCE:
                    writer.append(np.repeat(bits, counts))
                else:
                    for bit, count in zip(bits.tolist(), counts.tolist(), strict=True):
                        writer.append_run(bool(bit), count)
            writer.finalize()


def commit_corpus(prefix: str | os.PathLike[str], folder: Path, manifest: Manifest | None = None) -> None:
    """Give the finished files in a writer's folder their names. Killed in the middle of it, it can be done again."""
    paths, unfinished = CorpusPaths.of(prefix), CorpusPaths.of(folder / Path(prefix).name)
    # The .idx goes last, and an old one goes first: every reader opens it before the others, so whatever interrupts
    # these lines leaves a corpus that is whole or one that nothing opens.
    if unfinished.idx.exists():
        paths.idx.unlink(missing_ok=True)
        manifest_path(prefix).unlink(missing_ok=True)
        # Megatron keeps its sample indices beside the corpus and knows them by name and length, not by content.
        shutil.rmtree(paths.bin.with_suffix("") / "cache", ignore_errors=True)
    if manifest is not None:
        manifest.write(prefix)
    for source, target in ((unfinished.bin, paths.bin), (unfinished.lang, paths.lang), (unfinished.idx, paths.idx)):
        if source.exists():
            os.replace(source, target)


def make_folder(folder: Path) -> None:
    """Make an output folder, its parents included."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {folder} can't be made ({error.strerror}); choose another") from error


def _copy(path: Path, target: BinaryIO) -> None:
    with open(path, "rb") as source:
        shutil.copyfileobj(source, target)
