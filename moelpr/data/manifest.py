"""`<prefix>.manifest.json`: where a corpus comes from, what it contains, and the checksums of its files.

docs/data-format.md describes the keys.
"""

import dataclasses
import hashlib
import json
import os
import random
import types
import typing
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from tqdm import tqdm

import moelpr
from moelpr.data.tokenizers.base import Tokenizer, vocabulary_checksum
from moelpr.process.errors import UserError
from moelpr.store.checksums import Verify
from moelpr.store.files import parse_json, write_text

FORMAT_VERSION = 1
_BLOCK_BYTES = 1 << 22
SAMPLED_BLOCKS = 64
_FIX = "rebuild the corpus with data_tools/preprocess_data.py"


@dataclass
class Source:
    """An input file.

    Attributes:
        path: path as given, "-" for standard input.
        bytes: (compressed) file size; null for standard input.
        sha1: verified checksum from a registry, or null.
        documents: number of documents in this corpus, including empty ones.
    """

    path: str
    bytes: int | None
    sha1: str | None
    documents: int


@dataclass
class LanguageCount:
    """What a corpus contains of one language (or dataset of a registry).

    Attributes:
        bit: "original" or "expanded".
        documents: number of documents; one of several languages counts for each.
        tokens: number of tokens.
        bytes: size of the text in UTF-8; 0 if unknown.
    """

    bit: Literal["original", "expanded"]
    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, documents: int, tokens: int, bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.bytes += bytes


@dataclass
class FileRecord:
    """Size and checksums of a file.

    Attributes:
        block_crc32: CRC-32 of each 4 MiB, 8 hexadecimal digits each; None in older manifests.
    """

    bytes: int
    sha256: str
    block_crc32: str | None = None

    @classmethod
    def of(cls, path: Path, progress: Callable[[int], object] = lambda _: None) -> Self:
        """Read a file; `progress` is called with the bytes of each block."""
        checksum, blocks = hashlib.sha256(), []
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                checksum.update(block)
                blocks.append(_block_checksum(block))
                progress(len(block))
        return cls(path.stat().st_size, checksum.hexdigest(), "".join(blocks))

    @property
    def can_be_sampled(self) -> bool:
        """Whether `matches_sample` reads anything."""
        return self.block_crc32 is not None or self.bytes <= SAMPLED_BLOCKS * _BLOCK_BYTES

    def matches(self, path: Path, progress: Callable[[int], object] = lambda _: None) -> bool:
        """Read all of a file and compare it with the checksums."""
        if path.stat().st_size != self.bytes:
            return False
        found = FileRecord.of(path, progress)
        return found.sha256 == self.sha256 and self.block_crc32 in (None, found.block_crc32)

    def matches_sample(self, path: Path) -> bool:
        """Compare a file's size and `SAMPLED_BLOCKS` random blocks, other ones at each call.

        A short file is read completely.
        """
        if self.bytes <= SAMPLED_BLOCKS * _BLOCK_BYTES:
            return self.matches(path)
        if path.stat().st_size != self.bytes:
            return False
        if self.block_crc32 is None:
            return True
        num_blocks = -(-self.bytes // _BLOCK_BYTES)
        with open(path, "rb") as file:
            for block in random.SystemRandom().sample(range(num_blocks), SAMPLED_BLOCKS):
                file.seek(block * _BLOCK_BYTES)
                if _block_checksum(file.read(_BLOCK_BYTES)) != self.block_crc32[8 * block : 8 * block + 8]:
                    return False
        return True


@dataclass
class TokenizerRecord:
    """The tokenizer a corpus was made with.

    Attributes:
        type: Megatron's name of the type.
        model: path or name as given.
        eod_id: the ID that --append-eod adds after a document; null if the tokenizer has none.
        special_tokens: whether the tokens that the tokenizer adds around each text were kept.
        fingerprint: `Tokenizer.fingerprint`.
        vocabulary_sha256: `vocabulary_checksum` of all its IDs.
    """

    type: str
    model: str
    vocab_size: int
    eod_id: int | None
    special_tokens: bool
    fingerprint: str
    vocabulary_sha256: str

    @classmethod
    def of(cls, type: str, model: str, tokenizer: Tokenizer, eod_id: int | None, special_tokens: bool) -> Self:
        checksum = vocabulary_checksum(tokenizer.vocabulary(), tokenizer.vocab_size)
        return cls(type, model, tokenizer.vocab_size, eod_id, special_tokens, tokenizer.fingerprint(), checksum)


@dataclass
class Manifest:
    """Content of `<prefix>.manifest.json`.

    Attributes:
        append_eod: whether each document ends with the end-of-document token.
        languages: counts by language name.
        skipped_lines: number of malformed lines that --on-error skip omitted.
        files: "bin", "idx" and "lang".
        shard_of: the same in all shards of one job: a hash of its flags, and of the names and sizes of its input files;
            None if the corpus is no shard.
    """

    tokenizer: TokenizerRecord
    append_eod: bool
    sources: list[Source]
    languages: dict[str, LanguageCount]
    documents: int
    tokens: int
    skipped_lines: int
    files: dict[str, FileRecord]
    shard_of: str | None = None
    moelpr_version: str = field(default_factory=lambda: moelpr.__version__)
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, prefix: str | os.PathLike[str]) -> Self | None:
        """Read the manifest of a corpus; None if it has none.

        Raises:
            UserError: The manifest can't be read, is damaged, or has another format version.
        """
        path = manifest_path(prefix)
        try:
            content = parse_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise UserError(
                f"{path} can't be read ({[*str(error).splitlines(), type(error).__name__][0]}); {_FIX}, or remove it"
            ) from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version!r}, but only {FORMAT_VERSION} is supported; {_FIX}")
        try:
            return from_json(content, cls)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}; {_FIX}, or remove it") from error

    def verify_files(self, prefix: str | os.PathLike[str], verify: Verify = Verify.FULL) -> None:
        """Compare the corpus's files with their checksums.

        Args:
            verify: With `Verify.SAMPLED`, only a sample of the .bin is read.

        Raises:
            UserError: A file can't be read, is damaged or belongs to another corpus.
        """
        size = sum(record.bytes for record in self.files.values())
        with tqdm(total=size, desc="verifying", unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
            for name in ("idx", "lang", "bin"):
                path, record = Path(f"{os.fspath(prefix)}.{name}"), self.files.get(name)
                try:
                    if verify is Verify.SAMPLED and name == "bin":
                        is_same = record is not None and record.matches_sample(path)
                    else:
                        is_same = record is not None and record.matches(path, bar.update)
                except OSError as error:
                    raise UserError(f"{path} can't be read ({error.strerror}); {_FIX}") from error
                if not is_same:
                    raise UserError(
                        f"{path} is damaged or belongs to another corpus: its size or checksum differs from the "
                        f"manifest's; {_FIX}"
                    )

    def write(self, prefix: str | os.PathLike[str]) -> None:
        """Write the manifest beside its corpus, atomically."""
        write_text(manifest_path(prefix), json.dumps(self, default=vars, indent=2, ensure_ascii=False) + "\n")


def _block_checksum(block: bytes) -> str:
    return f"{zlib.crc32(block):08x}"


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the manifest file of a corpus prefix."""
    return Path(f"{os.fspath(prefix)}.manifest.json")


def from_json[T](value: Any, expected: type[T]) -> T:
    """Convert a JSON value to a dataclass of dataclasses and named tuples; `json.dumps(…, default=vars)` reverses it.

    Raises:
        ValueError: A key is missing or its value has another type than the annotated one.
    """
    return _parse(value, expected, "")


def _parse(value: Any, expected: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected) and isinstance(value, dict):
        hints = typing.get_type_hints(expected)
        optional = {field.name for field in dataclasses.fields(expected) if field.default is None}
        if missing := sorted(hints.keys() - value.keys() - optional):
            raise ValueError(f"{where}{missing[0]} is missing")
        # Unknown keys, of later versions of the same format, are ignored.
        parsed = {name: _parse(value[name], hints[name], f"{where}{name}.") for name in hints if name in value}
        return expected(**parsed)  # type: ignore[operator]
    if origin is list and isinstance(value, list):
        return [_parse(item, arguments[0], f"{where}{index}.") for index, item in enumerate(value)]
    if origin in (dict, Counter) and isinstance(value, dict):
        item_type = arguments[1] if origin is dict else int
        return origin({key: _parse(item, item_type, f"{where}{key}.") for key, item in value.items()})
    if isinstance(expected, type) and issubclass(expected, tuple) and isinstance(value, list):
        return expected(*value)
    if origin is types.UnionType and any(_is(value, option) for option in arguments):
        return value
    if expected is Any or (origin is Literal and value in arguments) or (origin is None and _is(value, expected)):
        return value
    raise ValueError(f"{where.removesuffix('.') or 'the file'} can't be {json.dumps(value)[:40]}")


def _is(value: Any, expected: Any) -> bool:
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(expected, type) and isinstance(value, expected)
