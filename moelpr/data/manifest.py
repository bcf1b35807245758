"""`<prefix>.manifest.json`: where a corpus comes from, what it holds, and the checksums of its files.

docs/data-format.md tells the keys. The file is written after the corpus it describes, by whoever writes a corpus.
"""

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

import moelpr
from moelpr.data.tokenizer import Tokenizer, load_tokenizer, vocabulary_checksum
from moelpr.errors import UserError
from moelpr.files import atomic_file

FORMAT_VERSION = 1
_REMEDY = "rebuild the corpus with data_tools/preprocess_data.py"


@dataclass
class Source:
    """An input file.

    Attributes:
        path: as it was given, "-" for standard input.
        bytes: the file's size, compressed where it is; null for standard input.
        sha1: from the registry and verified, else null.
        documents: those that went into this corpus, empty ones included.
    """

    path: str
    bytes: int | None
    sha1: str | None
    documents: int


@dataclass
class LanguageCount:
    """What a corpus holds of one language (or dataset of a registry).

    Attributes:
        bit: "original" or "expanded".
        documents: a document of several languages counts once for each.
        bytes: of text, in UTF-8.
    """

    bit: Literal["original", "expanded"]
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class FileRecord:
    """One of the corpus's files."""

    bytes: int
    sha256: str


@dataclass
class TokenizerRecord:
    """The tokenizer a corpus was made with.

    Attributes:
        type: Megatron's name of the kind.
        model: its path or name, as it was given.
        eod_id: the id --append-eod puts behind a document, null where the tokenizer has none.
        special_tokens: whether the tokenizer's own tokens around each text were kept.
        fingerprint: `Tokenizer.fingerprint`.
        vocabulary_sha256: `vocabulary_checksum` of all its ids.
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
    """What `<prefix>.manifest.json` holds.

    Attributes:
        languages: counts by language name.
        skipped_lines: broken lines that --on-error skip left out.
        files: "bin", "idx" and "lang".
    """

    tokenizer: TokenizerRecord
    append_eod: bool
    sources: list[Source]
    languages: dict[str, LanguageCount]
    documents: int
    tokens: int
    skipped_lines: int
    files: dict[str, FileRecord]
    moelpr_version: str = field(default_factory=lambda: moelpr.__version__)
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, prefix: str | os.PathLike[str]) -> Self | None:
        """The manifest of a corpus, None where there is none.

        Raises:
            UserError: it can't be read, is damaged, or of another format version.
        """
        path = manifest_path(prefix)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path} can't be read ({_first_line(error)}); {_REMEDY}, or remove it") from error
        return cls.from_json(content, str(path))

    @classmethod
    def from_json(cls, content: Any, name: str = "the manifest") -> Self:
        """A manifest of JSON's values.

        Raises:
            UserError: they are none.
        """
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{name} has format version {version!r}, this program reads {FORMAT_VERSION}; {_REMEDY}")
        try:
            manifest: Self = _parse(content, cls, "")
        except ValueError as error:
            raise UserError(f"{name} is damaged: {error}; {_REMEDY}, or remove it") from error
        return manifest

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, prefix: str | os.PathLike[str]) -> None:
        """Write it beside the corpus, whole or not at all."""
        with atomic_file(manifest_path(prefix)) as temporary:
            temporary.write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """The manifest of a corpus prefix."""
    return Path(f"{os.fspath(prefix)}.manifest.json")


class Likeness(StrEnum):
    """How a corpus's tokenizer compares with that of a model."""

    SAME = "same"  # every text gets the same ids
    SAME_TOKENS = "same tokens"  # an id means the same token, but a text may be cut up in another way
    DIFFERENT = "different"  # an id may mean another token
    UNKNOWN = "unknown"  # the model's folder has no tokenizer that can be loaded


def compare_tokenizers(corpus: TokenizerRecord, folder: str | os.PathLike[str]) -> Likeness:
    """Compare a corpus's tokenizer with the one in a Hugging Face folder, such as a checkpoint's `hf/`.

    Fingerprints decide where both are of one type. A .model file and the tokenizer.json made from it are different
    programs; there, and where fingerprints differ, what each of the corpus's ids means is compared.
    """
    candidates = {"HuggingFaceTokenizer": [Path(folder)]} | {
        "SentencePieceTokenizer": [Path(folder) / name for name in ("tokenizer.model", "spiece.model")]
    }
    likeness = Likeness.UNKNOWN
    for type, paths in candidates.items():
        for path in filter(Path.exists, paths):
            try:
                tokenizer = load_tokenizer(type, str(path))
            except UserError:
                continue
            if type == corpus.type and tokenizer.fingerprint() == corpus.fingerprint:
                return Likeness.SAME
            same = vocabulary_checksum(tokenizer.vocabulary(), corpus.vocab_size) == corpus.vocabulary_sha256
            if same:
                likeness = Likeness.SAME_TOKENS
            elif likeness is Likeness.UNKNOWN:
                likeness = Likeness.DIFFERENT
    return likeness


def _parse(value: Any, wanted: Any, where: str) -> Any:
    """JSON's value as the annotated type `wanted`; ValueError says where it isn't one."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        hints = typing.get_type_hints(wanted)
        if missing := sorted(hints.keys() - value.keys()):
            raise ValueError(f"{where}{missing[0]} is missing")
        # Keys of a later version of the same format are let through, as JSON readers do.
        parsed = {name: _parse(value[name], hint, f"{where}{name}.") for name, hint in hints.items()}
        return wanted(**parsed)  # type: ignore[operator]
    if origin is list and isinstance(value, list):
        return [_parse(item, arguments[0], f"{where}{index}.") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _parse(item, arguments[1], f"{where}{key}.") for key, item in value.items()}
    if origin is types.UnionType and any(_is(value, option) for option in arguments):
        return value
    if (origin is Literal and value in arguments) or (origin is None and _is(value, wanted)):
        return value
    raise ValueError(f"{where.removesuffix('.') or 'the file'} holds {json.dumps(value)[:40]}")


def _is(value: Any, wanted: Any) -> bool:
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(wanted, type) and isinstance(value, wanted)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
