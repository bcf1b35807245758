"""Writing a corpus: .bin and .idx in Megatron's format and .lang in ours, in constant memory."""

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.corpus import Corpus, CorpusPaths, describe
from data_tools.corpus.tokenized import Documents, as_tokens, runs_of, token_dtype
from moelpr.base.errors import UserError
from moelpr.base.files import (
    LOCK_FILE,
    empty,
    fsync_file,
    locked,
    locked_folder,
    make_folder,
    refuse_existing,
    temporary_name,
)
from moelpr.base.journal import partial_name
from moelpr.data.corpus_index import index_header
from moelpr.data.language_bits import LanguageBits, LanguageBitsWriter, loss_bits_path
from moelpr.data.manifest import FileRecord, Manifest, manifest_path

_CHUNK = 1 << 16  # items of an index held in memory at once
_BITS_AT_ONCE = 1 << 20
_LONGEST_NAME_BYTES = 255  # on all usual file systems


def smallest_vocab_size(corpus: Corpus) -> int:
    """Return the smallest vocabulary size whose token IDs have the dtype of this corpus."""
    return 1 if corpus.tokens.dtype.itemsize == 2 else 65_500


def check_output(prefix: str, overwrite: bool) -> None:
    """Check that a corpus can get this name.

    Raises:
        UserError: The prefix has no file name, or one that is too long; or the corpus exists and `overwrite` is False.
    """
    name = os.path.basename(prefix)
    if name in ("", ".", ".."):
        raise UserError(f"--output-prefix must end in a file name, such as data/el, got {prefix!r}")
    longest = os.fsencode(temporary_name(manifest_path(name)))
    if len(longest) > _LONGEST_NAME_BYTES:
        excess = len(longest) - _LONGEST_NAME_BYTES
        raise UserError(f"--output-prefix would give file names that are {excess} bytes too long ({name}); shorten it")
    if os.path.exists(CorpusPaths.of(prefix).idx) and not overwrite:  # it is False for a name that is too long
        # A writer that was killed after it had renamed its files has left its folder: the corpus is complete.
        folder = partial_name(Path(prefix))
        if folder.is_dir():
            with suppress(UserError, OSError), locked(folder / LOCK_FILE, prefix):  # else another one is writing there
                shutil.rmtree(folder)
    refuse_existing(list(CorpusPaths.of(prefix)), overwrite)


class Position(NamedTuple):
    """How much of a corpus is written."""

    tokens: int = 0
    original: int = 0
    sequences: int = 0
    documents: int = 0
    runs: int = 0
    loss_runs: int = 0


class CorpusWriter:
    """Writes a corpus in a temporary folder; `commit` renames the files. Used as a context manager, it removes what was
    not committed.

    Four files grow with the documents: the .bin itself, lengths of sequences, ends of documents (in sequences) and runs
    of language bits; of conversations, also runs of bits of the loss. `finalize` turns the others into .idx and .lang
    (and .loss). It has no journal: all of its state is a
    `Position`, which a preprocessing job saves in its own journal together with what else it has counted.

    Args:
        prefix: The corpus's path without .bin/.idx/.lang; its folder is created if necessary.
        vocab_size: Number of token IDs; decides the .bin's dtype as Megatron does (uint16 below 65,500, else int32).
        overwrite: Whether `commit` may replace an existing corpus.
        folder: Folder for unfinished files, on the corpus's file system; it is not removed.
        position: How much of the unfinished files in `folder` to keep: a return value of `flush`, perhaps in a process
            that was killed since.
        has_conversations: Whether the documents have runs of tokens that count in the loss.

    Attributes:
        at: How much is written.

    Raises:
        UserError: `check_output`, its folder can't be created, another process is writing the corpus, or the unfinished
            files are shorter than `position`.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        vocab_size: int,
        overwrite: bool = False,
        folder: Path | None = None,
        position: Position | None = None,
        has_conversations: bool = False,
    ) -> None:
        self.prefix = os.fspath(prefix)
        check_output(self.prefix, overwrite)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        name = Path(self.prefix).name
        # A killed process leaves this folder, so the next one uses the same name.
        self._folder = folder or partial_name(Path(self.prefix))
        with ExitStack() as stack:
            if folder:
                make_folder(folder)
            else:
                stack.enter_context(locked_folder(self._folder, self.prefix))
                stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
                refuse_existing(list(CorpusPaths.of(prefix)), overwrite)  # again: another writer may just have ended
                empty(self._folder)
            self._stack = stack.pop_all()
        self._unfinished = CorpusPaths.of(self._folder / name)
        parts = ("bin", "lengths", "ends", "runs", *(["loss-runs"] if has_conversations else []))
        self._parts = [self._folder / f"{name}.{part}" for part in parts]
        self._files: list[BinaryIO] = [open(path, "ab") for path in self._parts]
        self.at = at = position or Position()
        sizes = (at.tokens * self.dtype.itemsize, 4 * at.sequences, 8 * at.documents, 8 * at.runs, 8 * at.loss_runs)
        for file, expected in zip(self._files, sizes, strict=False):
            if file.tell() < expected:
                raise UserError(f"{file.name} is truncated, so the job can't be resumed; remove its folder")
            if file.tell() > expected:
                file.truncate(expected)

    def __str__(self) -> str:
        return describe(self.prefix, self.at.documents, self.at.tokens, self.at.original, self.dtype)

    def flush(self) -> Position:
        """Write everything to disk and return how much that is."""
        for file in self._files:
            if not file.closed:  # by finalize, which has written them to disk
                file.flush()
                os.fsync(file.fileno())
        return self.at

    def add(self, documents: Documents) -> None:
        """Add documents."""
        lengths = documents.lengths
        self._files[0].write(documents.tokens.tobytes())
        has_tokens = lengths > 0  # a document without tokens has no sequence, as in Megatron
        original = int((documents.runs >> 1)[documents.runs & 1 == 1].sum())
        runs = [documents.runs], [documents.loss_runs]
        self._advance(len(documents.tokens), original, lengths[has_tokens], np.cumsum(has_tokens), runs)

    def add_document(self, ids: NDArray[np.integer], is_original: bool) -> None:
        """Add one document: token IDs [tokens] that share one language bit. Without tokens, it has no sequence."""
        length = np.array([len(ids)], np.int64)
        self.add(Documents(as_tokens(ids, self.vocab_size), length, length << 1 | is_original))

    def add_corpus(self, corpus: Corpus) -> None:
        """Add another corpus, of the same dtype, unchanged."""
        append_file(corpus.paths.bin, self._files[0])
        runs = _runs_in(corpus.bits), [] if corpus.loss_bits is None else _runs_in(corpus.loss_bits)
        ends = corpus.document_starts[1:]
        self._advance(len(corpus.tokens), corpus.bits.num_original, corpus.sequence_lengths, ends, runs)

    def _advance(
        self,
        tokens: int,
        original: int,
        lengths: NDArray[np.integer],
        ends: NDArray[np.int64],
        runs: tuple[Iterable[NDArray[np.int64]], Iterable[NDArray[np.int64]]],
    ) -> None:
        """Write all but the tokens: sequence lengths, ends of documents in the added sequences, and runs of bits."""
        self._files[1].write(lengths.astype("<i4").tobytes())
        self._files[2].write((ends + self.at.sequences).astype("<i8").tobytes())
        num_runs = [0, 0]
        for kind, file in enumerate(self._files[3:]):
            for chunk in runs[kind]:
                file.write(chunk.astype("<i8").tobytes())
                num_runs[kind] += len(chunk)
        added = tokens, original, len(lengths), len(ends), *num_runs
        self.at = Position(*(old + new for old, new in zip(self.at, added, strict=True)))

    def finalize(self) -> dict[str, FileRecord]:
        """Complete the files in their folder, write them to disk, and return their sizes and checksums."""
        for file in self._files:
            file.close()
        self._write_index()
        written = [*self._unfinished, loss_bits_path(self._unfinished.bin.with_suffix(""))]
        for path, runs in zip(written[2:], self._parts[3:], strict=False):
            with LanguageBitsWriter(path) as writer, open(runs, "rb") as file:
                while len(chunk := np.fromfile(file, "<i8", _CHUNK)):
                    writer.append_runs(chunk)
                writer.finalize()
        written = written[: len(self._parts) - 1]
        for path in written:
            fsync_file(path)
        return {path.suffix[1:]: FileRecord.of(path) for path in written}

    def commit(self, manifest: Manifest | None = None) -> None:
        """Rename the finished files and write the manifest that describes them."""
        commit_corpus(self.prefix, self._folder, manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with suppress(OSError):  # closing flushes; on a full disk that fails again, and the first error counts
                file.close()
        self._stack.close()

    def _write_index(self) -> None:
        lengths, ends = self._parts[1:3]
        with open(self._unfinished.idx, "wb") as index:
            index.write(index_header(self.dtype, self.at.sequences, self.at.documents))
            append_file(lengths, index)
            start = 0
            with open(lengths, "rb") as file:
                while len(chunk := np.fromfile(file, "<i4", _CHUNK)):
                    stops = start + np.cumsum(chunk, dtype=np.int64)
                    index.write(((stops - chunk) * self.dtype.itemsize).astype("<i8").tobytes())
                    start = int(stops[-1])
            index.write(bytes(8))  # the first document begins at sequence 0
            append_file(ends, index)


def _runs_in(bits: LanguageBits) -> Iterable[NDArray[np.int64]]:
    starts = range(0, bits.num_tokens, _BITS_AT_ONCE)
    return (runs_of(bits.slice(start, min(start + _BITS_AT_ONCE, bits.num_tokens))) for start in starts)


def commit_corpus(prefix: str | os.PathLike[str], folder: Path, manifest: Manifest | None = None) -> None:
    """Rename the finished files in a writer's folder. Can be repeated if it is interrupted."""
    paths, unfinished = CorpusPaths.of(prefix), CorpusPaths.of(folder / Path(prefix).name)
    if manifest is not None:
        manifest.write(folder / Path(prefix).name)  # before the old corpus goes: the disk may be full
    # The .idx comes last, and an old one goes first: every reader opens it before the others, so an interruption leaves
    # a complete corpus or one that can't be opened.
    if unfinished.idx.exists():
        paths.idx.unlink(missing_ok=True)
        manifest_path(prefix).unlink(missing_ok=True)
        # The orders of samples that Megatron has saved next to the old corpus.
        for kind in ("TaggedGPTDataset", "GPTDataset"):
            shutil.rmtree(paths.bin.with_suffix("") / "cache" / f"{kind}_indices", ignore_errors=True)
    if manifest is not None:
        os.replace(manifest_path(folder / Path(prefix).name), manifest_path(prefix))
    loss, unfinished_loss = loss_bits_path(prefix), loss_bits_path(folder / Path(prefix).name)
    if not unfinished_loss.exists() and "loss" not in (manifest.files if manifest is not None else ()):
        loss.unlink(missing_ok=True)  # the old corpus had conversations
    moves = (unfinished.bin, paths.bin), (unfinished.lang, paths.lang), (unfinished_loss, loss)
    for source, target in (*moves, (unfinished.idx, paths.idx)):
        if source.exists():
            os.replace(source, target)


def append_file(path: Path, target: BinaryIO) -> None:
    """Copy a file to the end of an open one."""
    with open(path, "rb") as source:
        shutil.copyfileobj(source, target)
