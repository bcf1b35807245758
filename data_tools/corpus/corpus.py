"""Tokenized corpora: `<prefix>.bin` and `.idx` in Megatron's format and `.lang` in ours, opened and checked."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.language_bits import LanguageBits, language_bits_path, open_language_bits
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, Source, TokenizerRecord, manifest_path
from moelpr.process.errors import UserError
from moelpr.process.machine import allow_open_files

_FIX = "rebuild the corpus with data_tools/preprocess_data.py"


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


def run_edges(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return where runs of equal bits start, and the number of bits: [runs + 1]."""
    if not len(bits):
        return np.zeros(1, np.int64)
    return np.concatenate([[0], np.flatnonzero(np.diff(bits)) + 1, [len(bits)]])


class Corpus:
    """A corpus opened for reading, its three files compared with each other.

    Attributes:
        tokens: memory-mapped token IDs [tokens].
        bits: language bits.
        sequence_lengths: tokens of each sequence [sequences]; sequences are contiguous in `tokens`.
        document_starts: index of each document's first sequence, and the number of sequences [documents + 1].

    Raises:
        UserError: A file is missing or damaged, or two of them do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.paths = CorpusPaths.of(prefix)
        index = CorpusIndex.open(prefix)
        self.sequence_lengths, self.document_starts = index.sequence_lengths, index.document_starts
        self.tokens = np.memmap(self.paths.bin, index.dtype, "r") if index.num_tokens else np.zeros(0, index.dtype)
        self.bits: LanguageBits = open_language_bits(prefix, index.num_tokens)
        # Where each sequence and each document begins, in tokens.
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sequence_lengths, dtype=np.int64)])
        self._document_offsets = ends[self.document_starts]

    def verify(self) -> Manifest | None:
        """Read all of the corpus, compare it with its checksums, and return its manifest.

        Without a manifest (None), only the size of the .bin is known: a changed token ID goes unnoticed.

        Raises:
            UserError: The .lang or the manifest is damaged, or the manifest belongs to another corpus.
        """
        self.bits.verify()
        manifest = Manifest.read(self.prefix)
        if manifest is None:
            return None
        manifest.verify_files(self.prefix)
        languages = manifest.languages.values()
        original = sum(language.tokens for language in languages if language.bit == "original")
        for what, found, expected in (
            ("documents", self.num_documents, manifest.documents),
            ("tokens", self.bits.num_tokens, manifest.tokens),
            ("tokens of all languages", self.bits.num_tokens, sum(language.tokens for language in languages)),
            ("original-language tokens", self.bits.num_original, original),
        ):
            if found != expected:
                path = manifest_path(self.prefix)
                raise UserError(f"{self.prefix} contains {found:,} {what}, but {path} states {expected:,}; {_FIX}")
        return manifest

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
        """Return the token IDs and language bits of one document: [tokens] each."""
        start, stop = int(self._document_offsets[index]), int(self._document_offsets[index + 1])
        return self.tokens[start:stop], self.bits.slice(start, stop)


def open_corpora(prefixes: Sequence[str]) -> tuple[list[Corpus], list[Manifest] | None]:
    """Open several corpora, read all of them, and check that they can be joined.

    Returns:
        The corpora, and their manifests; None if one of them has no manifest.

    Raises:
        UserError: A corpus is damaged, or two have different tokenizers or different bits for one language.
    """
    allow_open_files()
    corpora = [Corpus(prefix) for prefix in prefixes]
    manifests = [corpus.verify() for corpus in corpora]
    found = [(prefix, manifest) for prefix, manifest in zip(prefixes, manifests, strict=True) if manifest is not None]
    bits: dict[str, tuple[str, str]] = {}  # language -> its first corpus, and its bit there
    for prefix, manifest in found:
        _compare_tokenizers(*found[0], prefix, manifest)
        for language, count in manifest.languages.items():
            other_prefix, other_bit = bits.setdefault(language, (prefix, count.bit))
            if count.bit != other_bit:
                raise UserError(
                    f"{language} is an {other_bit} language in {other_prefix}, but an {count.bit} one in {prefix}; "
                    "preprocess one of them again"
                )
    first = corpora[0].tokens.dtype
    for corpus in corpora:
        if corpus.tokens.dtype != first:
            raise UserError(
                f"{corpus.paths.bin} contains {corpus.tokens.dtype.name}, but {corpora[0].paths.bin} contains "
                f"{first.name}; join corpora of one tokenizer"
            )
    return corpora, [manifest for _, manifest in found] if len(found) == len(corpora) else None


def check_same_job(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise `UserError` if shards were not made by the same command from the same input: documents would be missing."""
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.shard_of != manifests[0].shard_of:
            raise UserError(
                f"{prefixes[0]} and {prefix} are shards of different jobs: their flags differ, or the names or sizes "
                "of their input files; preprocess all shards again, from the same input"
            )


def _compare_tokenizers(prefix: str, manifest: Manifest, other_prefix: str, other: Manifest) -> None:
    def identity(tokenizer: TokenizerRecord) -> tuple[object, ...]:
        # The path of the tokenizer does not matter.
        return tokenizer.type, tokenizer.fingerprint, tokenizer.vocabulary_sha256, tokenizer.special_tokens

    if identity(manifest.tokenizer) != identity(other.tokenizer):
        raise UserError(
            f"{prefix} was made with the tokenizer {manifest.tokenizer.model}, {other_prefix} with another, "
            f"{other.tokenizer.model}; tokenize both with the same one"
        )
    if manifest.append_eod != other.append_eod or manifest.tokenizer.eod_id != other.tokenizer.eod_id:
        raise UserError(
            f"the documents of {prefix} and {other_prefix} end in different tokens; tokenize both with or both without "
            "--append-eod"
        )


def merge_manifests(manifests: Sequence[Manifest], files: dict[str, FileRecord]) -> Manifest:
    """Return the manifest of concatenated corpora, whose files are `files`.

    A source that is in several of them (shards of one job share their input) is listed once.
    """
    sources: dict[object, Source] = {}
    languages: dict[str, LanguageCount] = {}
    for manifest in manifests:
        for source in manifest.sources:
            key = source.path, source.bytes, source.sha1
            sources.setdefault(key, dataclasses.replace(source, documents=0)).documents += source.documents
        for name, count in manifest.languages.items():
            languages.setdefault(name, LanguageCount(count.bit)).add(count.documents, count.tokens, count.bytes)
    return Manifest(
        tokenizer=manifests[0].tokenizer,
        append_eod=manifests[0].append_eod,
        sources=list(sources.values()),
        languages=dict(sorted(languages.items())),
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        skipped_lines=sum(manifest.skipped_lines for manifest in manifests),
        files=files,
    )


def missing_manifests(corpora: Sequence[Corpus], output_prefix: str) -> str:
    """Return a note on why the output has no manifest."""
    missing = [corpus.prefix for corpus in corpora if not manifest_path(corpus.prefix).exists()]
    verb = "has" if len(missing) == 1 else "have"
    return f"note: {', '.join(missing)} {verb} no manifest, so {output_prefix} gets none"
