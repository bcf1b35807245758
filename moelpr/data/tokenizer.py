"""Tokenizers named by Megatron's flags, with Megatron's IDs, that encode batches of texts."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

from moelpr.process.errors import UserError, first_line, reports_panics

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer")

# The keys of an added token that decide where it is found in a text.
_ADDED_TOKEN_KEYS = ("id", "content", "single_word", "lstrip", "rstrip", "normalized")


class Tokenizer(Protocol):
    """Converts text to token IDs and back.

    Attributes:
        vocab_size: number of IDs as Megatron counts them, including added tokens.
        eod_id: ID of the end-of-document token; None if the tokenizer has none.
        splits_special_tokens: whether special tokens that occur in a text are encoded as ordinary text.
    """

    vocab_size: int
    eod_id: int | None
    splits_special_tokens: bool

    def encode_batch(self, texts: list[str], special_tokens: bool = True) -> list[list[int]]:
        """Return the IDs of each text, with the tokens added around it if requested here and when loading."""

    def decode(self, ids: list[int]) -> str: ...

    def serialized(self) -> str | bytes | None:
        """Return the content of a tokenizer.json or .model file; None for tokenizers of another kind."""

    def fingerprint(self) -> str:
        """Return a string that is equal for tokenizers of one type that give every text the same IDs.

        It ignores what does not affect IDs (decoder, truncation, padding, training settings) and the tokens added
        around a text, which a corpus may omit. Saving and loading a tokenizer does not change it.
        """

    def vocabulary(self) -> dict[str, int]:
        """Return the ID of each token, including added tokens."""


# Text that a tokenizer may lose parts of if it is loaded as one of another kind.
_PROBES = ("two words", "a\nb 12", "φως 光")


def check_text_is_kept(folder: str | os.PathLike[str], tokenizer: Any) -> None:
    """Check a Hugging Face tokenizer, as transformers has loaded it, against the tokenizer.json in its folder.

    transformers chooses the class by the model_type of config.json, and some classes replace the file's normalizer and
    pre-tokenizer. Over a vocabulary that writes a space as ▁, Qwen2's then drops every space.

    Raises:
        UserError: The file keeps text that the loaded tokenizer loses.
    """
    path = Path(folder) / "tokenizer.json"
    if not (tokenizer.is_fast and path.is_file()):
        return
    from tokenizers import Tokenizer as FileTokenizer

    in_file: Any = None
    for text in _PROBES:
        try:
            with reports_panics():
                ids = tokenizer.encode(text, add_special_tokens=False)
                found = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                if found != text:
                    in_file = in_file or FileTokenizer.from_file(str(path))
                    kept = in_file.decode(in_file.encode(text, add_special_tokens=False).ids)
        except Exception:  # tokenizers raises no other, for a damaged file or text that a vocabulary cannot express
            continue
        if found != text and kept == text:
            raise UserError(
                f"transformers loads the tokenizer in {folder} as {type(tokenizer).__name__}, which loses text that "
                f"its tokenizer.json keeps ({text!r} becomes {found!r}); set tokenizer_class in tokenizer_config.json "
                "to PreTrainedTokenizerFast, or, if this is a Qwen2, for which transformers ignores it, use another "
                "model"
            )


_MAX_IDS = 10_000_000  # the largest published vocabularies have a million


def open_hf_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder, or of a cached model, as transformers opens it; UserError if it cannot be opened."""
    check_tokenizer_files(source)
    from transformers import AutoTokenizer  # takes two seconds, which SentencePiece does not need

    try:
        with reports_panics():
            return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise any exception
        if not Path(source).exists():
            raise UserError(
                f"there is no tokenizer folder {source}, and the Hugging Face cache has no model of this name; hub "
                "names are not downloaded: run hf download NAME --local-dir DIR first"
            ) from error
        raise UserError(
            f"the tokenizer in {source} cannot be opened ({first_line(error)}); it must be a folder with "
            "tokenizer.json and tokenizer_config.json"
        ) from error


def check_tokenizer_files(folder: str | os.PathLike[str]) -> None:
    """Check what libraries take from a folder's files unchecked.

    Raises:
        UserError: A token's ID would take gigabytes and minutes, because libraries count up to it; or the largest
            length is no number.
    """
    _check_max_length(Path(folder) / "tokenizer_config.json")
    for name in ("tokenizer.json", "vocab.json"):
        path = Path(folder) / name
        try:
            content = json.loads(path.read_bytes())
            vocabulary = content["model"]["vocab"] if name == "tokenizer.json" else content
            token, id = max(vocabulary.items(), key=lambda item: item[1])
            is_small = id < _MAX_IDS
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue  # loading the tokenizer reports what is wrong; a unigram model's list has no IDs
        if not is_small:
            raise UserError(
                f"{path} gives {token!r} the ID {id:,}; expected IDs below {_MAX_IDS:,}; download the tokenizer again"
            )


def _check_max_length(path: Path) -> None:
    try:
        length = json.loads(path.read_bytes()).get("model_max_length", 0)
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # loading the tokenizer reports what is wrong
    if length is not None and type(length) not in (int, float):
        raise UserError(f"{path}: model_max_length must be a number, got {length!r}; download the tokenizer again")


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool) -> argparse._ArgumentGroup:
    """Add the tokenizer flags, with Megatron's names and meaning, and return their group."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=required, help="tokenizer library")
    group.add_argument("--tokenizer-model", metavar="PATH", required=required,
        help="a folder with tokenizer.json (HuggingFaceTokenizer) or a .model file "
        "(SentencePieceTokenizer)")  # fmt: skip
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true",
        help="omit the special tokens that a Hugging Face tokenizer adds around every text (default: keep them, as "
        "Megatron does; Qwen's tokenizers add none)")  # fmt: skip
    return group


def vocabulary_checksum(vocabulary: dict[str, int], vocab_size: int) -> str:
    """Return the SHA-256 of the tokens with IDs below `vocab_size`.

    It is equal for tokenizers of any type in which those IDs are the same tokens, such as a SentencePiece .model and
    its Hugging Face form with more tokens.
    """
    return _sha256(sorted((id, token) for token, id in vocabulary.items() if id < vocab_size))


def load_tokenizer(
    tokenizer_type: str, tokenizer_model: str, include_special_tokens: bool = True, must_keep_text: bool = False
) -> Tokenizer:
    """Load a local tokenizer; nothing is downloaded and none of its code is run.

    Args:
        tokenizer_model: a folder (or the name of a cached model) or a SentencePiece .model file.
        include_special_tokens: keep the tokens that a Hugging Face tokenizer adds around a text, such as Llama's <s>;
            SentencePiece never adds any.
        must_keep_text: see `check_text_is_kept`.

    Raises:
        UserError: The tokenizer can't be loaded, or loses text.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        return _HuggingFaceTokenizer(tokenizer_model, include_special_tokens, must_keep_text)
    if tokenizer_type == "SentencePieceTokenizer":
        return _SentencePieceTokenizer(tokenizer_model)
    raise UserError(f"--tokenizer-type must be one of {', '.join(TOKENIZER_TYPES)}, got {tokenizer_type}")


class _HuggingFaceTokenizer:
    def __init__(self, model: str, include_special_tokens: bool, must_keep_text: bool) -> None:
        tokenizer = open_hf_tokenizer(model)
        if must_keep_text:
            check_text_is_kept(model, tokenizer)
        self._tokenizer = tokenizer
        self._include_special_tokens = include_special_tokens
        self.vocab_size: int = len(tokenizer)
        # Megatron uses the separator if a tokenizer (BERT's) has only that.
        self.eod_id: int | None = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.splits_special_tokens: bool = tokenizer.split_special_tokens
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # transformers does this before each call; calling the underlying library directly is 2.6 times as fast.
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self.splits_special_tokens

    def encode_batch(self, texts: list[str], special_tokens: bool = True) -> list[list[int]]:
        special_tokens = special_tokens and self._include_special_tokens
        if self._backend is not None:
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=special_tokens)
            return [encoding.ids for encoding in encoded]
        options = {"add_special_tokens": special_tokens, "return_attention_mask": False, "verbose": False}
        return list(self._tokenizer(texts, **options)["input_ids"])

    def serialized(self) -> str | bytes | None:
        return None if self._backend is None else self._backend.to_str()

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def fingerprint(self) -> str:
        if self._backend is None:
            return f"huggingface:{_sha256([type(self._tokenizer).__name__, self._tokenizer.get_vocab()])}"
        # Not the file: transformers replaces parts of some models' tokenizer.json.
        parts: dict[str, Any] = json.loads(self._backend.to_str())
        added = [{key: token[key] for key in _ADDED_TOKEN_KEYS} for token in parts["added_tokens"]]
        return f"huggingface:{_sha256([parts['normalizer'], parts['pre_tokenizer'], parts['model'], added])}"

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())


class _SentencePieceTokenizer:
    def __init__(self, model: str) -> None:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor()
        try:
            processor.Load(str(Path(model)))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"can't load a tokenizer from {model}; --tokenizer-model must be a SentencePiece .model file"
            ) from error
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        self.eod_id: int | None = processor.eos_id() if processor.eos_id() >= 0 else None
        self.splits_special_tokens = True

    def serialized(self) -> str | bytes | None:
        return bytes(self._processor.serialized_model_proto())

    def encode_batch(self, texts: list[str], special_tokens: bool = True) -> list[list[int]]:
        return list(self._processor.encode(texts, out_type=int, num_threads=1))

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def fingerprint(self) -> str:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

        model = ModelProto.FromString(self._processor.serialized_model_proto())
        parts = [
            [(piece.piece, piece.score, piece.type) for piece in model.pieces],
            [model.trainer_spec.model_type, model.trainer_spec.byte_fallback],
            [model.trainer_spec.treat_whitespace_as_suffix],
            model.normalizer_spec.precompiled_charsmap.hex(),
            [model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces],
            [model.normalizer_spec.escape_whitespaces],
        ]
        return f"sentencepiece:{_sha256(parts)}"

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(id): id for id in range(self.vocab_size)}


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
