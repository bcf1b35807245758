"""A tokenized corpus: `<prefix>.bin` and `.idx` in Megatron's format, `.lang` in ours, opened and checked together."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.language_bits import LanguageBits, language_bits_path, open_language_bits
from moelpr.data.manifest import FileRecord, Manifest, manifest_path
from moelpr.errors import UserError

_PIECE = 1 << 22
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
        index = CorpusIndex.open(prefix)
        self.sequence_lengths, self.document_starts = index.sequence_lengths, index.document_starts
        self.tokens = np.memmap(self.paths.bin, index.dtype, "r") if index.num_tokens else np.zeros(0, index.dtype)
        self.bits: LanguageBits = open_language_bits(prefix, index.num_tokens)
        # Where a sequence or a document begins, in tokens.
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sequence_lengths, dtype=np.int64)])
        self._document_offsets = ends[self.document_starts]

    def verify(self) -> Manifest | None:
        """Read all of it and compare it with its checksums; the manifest, or None where there is none.

        Without a manifest nothing is known of the .bin but its size: a changed token id goes unseen.

        Raises:
            UserError: the .lang or the manifest is damaged, or the manifest is that of another corpus.
        """
        self.bits.verify()
        manifest = Manifest.read(self.prefix)
        if manifest is not None:
            size = sum(path.stat().st_size for path in self.paths)
            with tqdm(
                total=size, desc="verifying", unit="B", unit_scale=True, delay=2, leave=False, disable=None
            ) as bar:
                for path in self.paths:
                    _compare(path, manifest.files.get(path.suffix[1:]), bar)
            self._compare_counts(manifest)
        return manifest

    def _compare_counts(self, manifest: Manifest) -> None:
        languages = manifest.languages.values()
        original = sum(language.tokens for language in languages if language.bit == "original")
        for what, found, said in (
            ("documents", self.num_documents, manifest.documents),
            ("tokens", self.bits.num_tokens, manifest.tokens),
            ("tokens of all languages", self.bits.num_tokens, sum(language.tokens for language in languages)),
            ("original-language tokens", self.bits.num_original, original),
        ):
            if found != said:
                raise UserError(
                    f"{self.prefix} holds {found:,} {what}, {manifest_path(self.prefix)} says {said:,}; {_REMEDY}"
                )

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document: [documents]."""
        return np.diff(self._document_offsets)

    @property
    def is_original_document(self) -> NDArray[np.bool_]:
        """Whether each document's first token is of an original language: [documents]; False for empty ones."""
        starts, lengths = self._document_offsets[:-1], self.document_lengths
        found = np.zeros(len(starts), np.bool_)
        found[lengths > 0] = self.bits.at(starts[lengths > 0])
        return found

    def document(self, index: int) -> tuple[NDArray[np.number], NDArray[np.uint8]]:
        """Token ids and language bits of one document: [tokens] each."""
        start, stop = int(self._document_offsets[index]), int(self._document_offsets[index + 1])
        return self.tokens[start:stop], self.bits.slice(start, stop)


def _compare(path: Path, record: FileRecord | None, progress: tqdm) -> None:
    """Compare a file with what the manifest says of it."""
    checksum = hashlib.sha256()
    with open(path, "rb") as content:
        while piece := content.read(_PIECE):
            checksum.update(piece)
            progress.update(len(piece))
    if record != FileRecord(path.stat().st_size, checksum.hexdigest()):
        raise UserError(
            f"{path} is damaged or another corpus's: its size and checksum are not the manifest's; {_REMEDY}"
        )
