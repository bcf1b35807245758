"""Tokenized corpora: `<prefix>.bin` and `.idx` in Megatron's format and `.lang` in ours, opened and checked."""

import os
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from moelpr.base.errors import UserError
from moelpr.data.corpus_index import REBUILD, CorpusIndex
from moelpr.data.language_bits import language_bits_path, open_bits
from moelpr.data.manifest import Manifest, manifest_path


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
    """Return the prefix under which one of the jobs that share a corpus writes its part."""
    return f"{os.fspath(prefix)}.shard-{shard:05d}-of-{num_shards:05d}"


def describe(prefix: str, documents: int, tokens: int, original_tokens: int, dtype: np.dtype) -> str:
    """Return a line that describes a corpus."""
    share = original_tokens / max(tokens, 1)  # a shard may be empty
    counts = f"{documents:,} documents, {tokens:,} tokens ({share:.1%} original-language)"
    return f"{prefix}.bin, .idx, .lang: {counts}, {dtype.name}"


class Corpus:
    """A corpus opened for reading, its three files compared with each other.

    Attributes:
        tokens: Memory-mapped token IDs [tokens].
        bits: Language bits.
        loss_bits: Which tokens count in the loss; None unless it has conversations.
        sequence_lengths: Tokens of each sequence [sequences]; sequences are contiguous in `tokens`.
        document_starts: Index of each document's first sequence, and the number of sequences [documents + 1].
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.paths = CorpusPaths.of(prefix)
        index = CorpusIndex.open(prefix)
        self.sequence_lengths, self.document_starts = index.sequence_lengths, index.document_starts
        self.tokens = np.memmap(self.paths.bin, index.dtype, "r") if index.num_tokens else np.zeros(0, index.dtype)
        self.bits, self.loss_bits = open_bits(prefix, index.num_tokens)
        # Where each sequence and each document begins, in tokens.
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sequence_lengths, dtype=np.int64)])
        self._document_offsets = ends[self.document_starts]

    def verify(self) -> Manifest | None:
        """Read all of the corpus, compare it with its checksums, and return its manifest.

        Without a manifest (None), only the size of the .bin is known: a changed token ID goes unnoticed.
        """
        for bits in filter(None, (self.bits, self.loss_bits)):
            bits.verify()
        if (manifest := Manifest.read(self.prefix)) is None:
            return None
        manifest.verify_files(self.prefix)
        languages = manifest.languages.values()
        original = sum(language.tokens for language in languages if language.bit == "original")
        for what, actual, expected in (
            ("documents", self.num_documents, manifest.documents),
            ("tokens", self.bits.num_tokens, manifest.tokens),
            ("tokens of all languages", self.bits.num_tokens, sum(language.tokens for language in languages)),
            ("original-language tokens", self.bits.num_original, original),
        ):
            if actual != expected:
                path = manifest_path(self.prefix)
                raise UserError(f"{self.prefix} contains {actual:,} {what}, but {path} states {expected:,}; {REBUILD}")
        return manifest

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document: [documents]."""
        return np.diff(self._document_offsets)

    def document(self, index: int) -> tuple[NDArray[np.number], NDArray[np.uint8]]:
        """Return the token IDs and language bits of one document: [tokens] each."""
        start, stop = int(self._document_offsets[index]), int(self._document_offsets[index + 1])
        return self.tokens[start:stop], self.bits.slice(start, stop)
