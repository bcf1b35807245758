"""Tokenizers as Megatron's own flags name them, with Megatron's ids, encoding batches of texts."""

import argparse
from pathlib import Path
from typing import Protocol

from moelpr.errors import UserError

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer")


class Tokenizer(Protocol):
    """What turning text into tokens and back needs.

    Attributes:
        vocab_size: number of ids as Megatron counts them, added tokens included.
        eod_id: the id that ends a document, None where the tokenizer has none.
    """

    vocab_size: int
    eod_id: int | None

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """The tokenizer flags, with Megatron's names and meaning."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=required)
    group.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        required=required,
        help="a folder with tokenizer.json (HuggingFaceTokenizer) or a .model file (SentencePieceTokenizer)",
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out the special tokens a Hugging Face tokenizer puts around every text (default: keep them, as "
        "Megatron does; Qwen's tokenizers add none)",
    )


def load_tokenizer(tokenizer_type: str, tokenizer_model: str, include_special_tokens: bool = True) -> Tokenizer:
    """Load a tokenizer from this machine; nothing is downloaded and no code of the tokenizer's is run.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES.
        tokenizer_model: a folder (or the name of a cached model) or a SentencePiece .model file.
        include_special_tokens: keep what a Hugging Face tokenizer adds around a text, such as Llama's <s>;
            SentencePiece never adds any.

    Raises:
        UserError: it can't be loaded.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        return _HuggingFaceTokenizer(tokenizer_model, include_special_tokens)
    if tokenizer_type == "SentencePieceTokenizer":
        return _SentencePieceTokenizer(tokenizer_model)
    raise UserError(f"the tokenizer type {tokenizer_type} is unknown; choose one of {', '.join(TOKENIZER_TYPES)}")


class _HuggingFaceTokenizer:
    def __init__(self, model: str, include_special_tokens: bool) -> None:
        from transformers import AutoTokenizer  # two seconds; SentencePiece users don't pay them

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                model, local_files_only=True, use_fast=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises whatever a broken file made it stumble over
            raise UserError(
                f"no tokenizer can be loaded from {model}; "
                f"--tokenizer-model wants a folder with tokenizer.json and tokenizer_config.json"
            ) from error
        self._tokenizer = tokenizer
        self._include_special_tokens = include_special_tokens
        self.vocab_size: int = len(tokenizer)
        # Megatron takes the separator for the end where a tokenizer (BERT's) has only that.
        self.eod_id: int | None = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # What transformers does before each call. Calling the library underneath directly is 2.6 times as fast.
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = tokenizer.split_special_tokens

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=self._include_special_tokens)
            return [encoding.ids for encoding in encoded]
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=self._include_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


class _SentencePieceTokenizer:
    def __init__(self, model: str) -> None:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor()
        try:
            processor.Load(str(Path(model)))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"no tokenizer can be loaded from {model}; --tokenizer-model wants a SentencePiece .model file"
            ) from error
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        self.eod_id: int | None = processor.eos_id() if processor.eos_id() >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(texts, out_type=int, num_threads=1)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text
