"""`<prefix>.manifest.json`: where a corpus comes from, what it contains, and the checksums of its files."""

import hashlib
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

import moelpr
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record
from moelpr.data.corpus_index import REBUILD
from moelpr.data.tokenizers.base import Tokenizer, vocabulary_checksum

BLOCK_BYTES = 1 << 22
SAMPLED_BLOCKS = 64

Count = Annotated[int, Field(ge=0)]
# The two values of a language bit, by name.
Bit = Literal["original", "expanded"]


@dataclass(config=STRICT)
class Source:
    """An input file.

    Attributes:
        path: The path as given, "-" for standard input; a remote file's URI, on the Hub with its commit.
        bytes: The (compressed) size of the file; null for standard input.
        sha1: The verified checksum from a registry, or null.
        documents: Number of its documents in this corpus, including empty ones.
        version: The checksum or ETag that a remote file had; null for a local one.
    """

    path: str
    bytes: Count | None
    sha1: str | None
    documents: Count
    version: str | None = None


@dataclass(config=STRICT)
class LanguageCount:
    """Counts of one language of a corpus (or dataset of a registry).

    Attributes:
        bit: "original" or "expanded".
        documents: Number of documents; one of several languages counts for each.
        tokens: Number of tokens.
        bytes: Size of the text in UTF-8; 0 if unknown.
    """

    bit: Bit
    documents: Count = 0
    tokens: Count = 0
    bytes: Count = 0

    def add(self, documents: int, tokens: int, bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.bytes += bytes


@dataclass(frozen=True, config=STRICT)
class FileRecord:
    """The size and the checksums of a file.

    Attributes:
        bytes: Size of the file.
        sha256: SHA-256 of its content.
        block_crc32: CRC-32 of each 4 MiB, 8 hexadecimal digits each.
    """

    bytes: Count
    sha256: str
    block_crc32: str

    @classmethod
    def of(cls, path: Path, progress: Callable[[int], object] = lambda _: None) -> Self:
        """Read a file; `progress` is called with the bytes of each block."""
        checksum, blocks, size = hashlib.sha256(), [], 0
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                checksum.update(block)
                blocks.append(_block_checksum(block))
                size += len(block)
                progress(len(block))
        return cls(size, checksum.hexdigest(), "".join(blocks))

    def matches(self, path: Path, progress: Callable[[int], object] = lambda _: None) -> bool:
        """Read all of a file and compare it with the checksums."""
        return path.stat().st_size == self.bytes and self == FileRecord.of(path, progress)

    def matches_sample(self, path: Path) -> bool:
        """Compare a file's size and `SAMPLED_BLOCKS` random blocks, other ones at each call.

        A short file is read completely.
        """
        if self.bytes <= SAMPLED_BLOCKS * BLOCK_BYTES:
            return self.matches(path)
        if path.stat().st_size != self.bytes:
            return False
        num_blocks = -(-self.bytes // BLOCK_BYTES)
        with open(path, "rb") as file:
            for block in random.SystemRandom().sample(range(num_blocks), SAMPLED_BLOCKS):
                file.seek(block * BLOCK_BYTES)
                if _block_checksum(file.read(BLOCK_BYTES)) != self.block_crc32[8 * block : 8 * block + 8]:
                    return False
        return True


@dataclass(frozen=True, config=STRICT)
class TokenizerRecord:
    """The tokenizer a corpus was made with.

    Attributes:
        type: Megatron's name of the type.
        model: The path or name as given.
        vocab_size: Number of its IDs.
        eod_id: The ID that --append-eod adds after a document; null if the tokenizer has none.
        special_tokens: Whether the tokens that the tokenizer adds around each text were kept.
        fingerprint: A hash that is equal for tokenizers of one type that give every text the same IDs.
        vocabulary_sha256: SHA-256 of all tokens with their IDs.
    """

    type: str
    model: str
    vocab_size: Count
    eod_id: Count | None
    special_tokens: bool
    fingerprint: str
    vocabulary_sha256: str

    @classmethod
    def of(cls, type: str, model: str, tokenizer: Tokenizer, eod_id: int | None, special_tokens: bool) -> Self:
        checksum = vocabulary_checksum(tokenizer.vocabulary(), tokenizer.vocab_size)
        return cls(type, model, tokenizer.vocab_size, eod_id, special_tokens, tokenizer.fingerprint(), checksum)


@dataclass(frozen=True, config=STRICT)
class Manifest(Record):
    """A corpus's origin, next to its files as `PREFIX.manifest.json`.

    Attributes:
        tokenizer: The tokenizer it was made with.
        append_eod: Whether each document ends with the end-of-document token.
        sources: Input files, in the order they were read.
        languages: Counts by language name.
        documents: Number of documents, including empty ones.
        tokens: Number of tokens.
        skipped_lines: Number of lines omitted: malformed ones with --on-error skip, and documents of more than 16 MiB.
        files: Size and checksums of "bin", "idx" and "lang", and of a corpus of conversations "loss".
        shard_of: The same in all shards of one job: a hash of its flags, and of the names and sizes of its input files;
            null if the corpus is not a shard.
        moelpr_version: Version of the program that wrote the corpus.
        filter: The condition of --filter, which its documents meet; null: none.
        filtered_documents: Number of documents that it dropped.
    """

    FILE_NAME: ClassVar[str] = "PREFIX.manifest.json"
    REMEDY: ClassVar[str] = f"{REBUILD}, or remove it"
    ASCII: ClassVar[bool] = False

    tokenizer: TokenizerRecord
    append_eod: bool
    sources: list[Source]
    languages: dict[str, LanguageCount]
    documents: Count
    tokens: Count
    skipped_lines: Count
    files: dict[str, FileRecord]
    shard_of: str | None = None
    moelpr_version: str = field(default_factory=lambda: moelpr.__version__)
    filter: str | None = None
    filtered_documents: Count = 0

    @classmethod
    def read(cls, prefix: str | os.PathLike[str]) -> Self | None:  # type: ignore[override]  # a corpus may have none
        """Read the manifest of a corpus; None if it has none."""
        path = manifest_path(prefix)
        return cls.read_file(path) if os.path.lexists(path) else None

    def verify_files(self, prefix: str | os.PathLike[str], verify: Verify = Verify.FULL) -> None:
        """Compare the corpus's files with their checksums.

        Args:
            verify: With `Verify.SAMPLED`, only a sample of the .bin is read.
        """
        size = sum(record.bytes for record in self.files.values())
        with tqdm(total=size, desc="verifying", unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
            for name in ("idx", "lang", *(["loss"] if "loss" in self.files else []), "bin"):
                path, record = Path(f"{os.fspath(prefix)}.{name}"), self.files.get(name)
                try:
                    if verify is Verify.SAMPLED and name == "bin":
                        is_same = record is not None and record.matches_sample(path)
                    else:
                        is_same = record is not None and record.matches(path, bar.update)
                except OSError as error:
                    raise UserError(f"{path} can't be read ({error.strerror}); {REBUILD}") from error
                if not is_same:
                    raise UserError(
                        f"{path} is damaged or belongs to another corpus: its size or checksum differs from the "
                        f"manifest's; {REBUILD}"
                    )

    def as_json(self) -> dict[str, Any]:
        content = super().as_json()
        return content | {"format_version": content.pop("format_version")}  # the last field

    def write(self, prefix: str | os.PathLike[str]) -> None:
        """Write the manifest next to its corpus, complete or not at all."""
        self.write_file(manifest_path(prefix))


def _block_checksum(block: bytes) -> str:
    return f"{zlib.crc32(block):08x}"


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the manifest file of a corpus prefix."""
    return Path(f"{os.fspath(prefix)}.manifest.json")
