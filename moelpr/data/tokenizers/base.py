"""The interface of every tokenizer, whichever library runs it."""

import hashlib
import json
from abc import ABC, abstractmethod
from itertools import chain
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moelpr.base.errors import UserError


class Encoded(NamedTuple):
    """Token IDs of several texts, concatenated."""

    ids: NDArray[np.int32]  # the token IDs, int32 [tokens]
    lengths: NDArray[np.int64]  # the number of tokens of each text, int64 [texts]

    @classmethod
    def of(cls, rows: list[list[int]]) -> "Encoded":
        """Concatenate the IDs of several texts."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths)


class Piece(NamedTuple):
    """Tokens of a part of a text."""

    ids: NDArray[np.int32]  # the token IDs, int32 [tokens]
    starts: NDArray[np.int64]  # the character of the text that contains each token's first byte, int64 [tokens]


class Tokenizer(ABC):
    """A tokenizer with Megatron's IDs. Can be pickled.

    Attributes:
        name: The library that runs it.
        source: Content of its tokenizer.json (str) or .model file (bytes).
        vocab_size: Number of IDs as Megatron counts them, including added tokens.
        eod_id: ID of the end-of-document token; None if the tokenizer has none.
        added_tokens: Tokens that were added to the vocabulary of its model.
        literal_tokens: Special tokens that are ordinary text where a text contains their name.
    """

    name: ClassVar[str]
    source: str | bytes
    vocab_size: int
    eod_id: int | None
    added_tokens: list[str]
    literal_tokens: list[str]

    @abstractmethod
    def encode(self, texts: list[str]) -> Encoded:
        """Encode texts, without the tokens that the tokenizer adds around a text."""

    @abstractmethod
    def encode_with_starts(self, text: str) -> Piece:
        """Encode a text like `encode`, and say where each token begins."""

    @abstractmethod
    def encode_whole(self, text: str) -> list[int]:
        """Encode a text, with the tokens that the tokenizer adds around it, such as Llama's <s>."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of token IDs, special tokens included."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return the ID of each token, including added tokens."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that is equal for tokenizers of one type that give every text the same IDs.

        It ignores what does not affect IDs (decoder, truncation, padding, training settings) and the tokens added
        around a text, which a corpus may omit. Saving and loading a tokenizer does not change it.
        """

    def around_text(self) -> tuple[list[int], list[int]]:
        """Return the IDs that the tokenizer adds before and after each text.

        Raises:
            UserError: They differ from text to text.
        """
        added, inside, full = self.encode_whole(""), self.encode(["x"]).ids.tolist(), self.encode_whole("x")
        for length in range(len(added) + 1):
            if full == [*added[:length], *inside, *added[length:]]:
                return added[:length], added[length:]
        raise UserError(
            "the tokenizer adds different tokens to different texts; pass --tokenizer-hf-no-include-special-tokens"
        )


def vocabulary_checksum(vocabulary: dict[str, int], vocab_size: int) -> str:
    """Return the SHA-256 of the tokens with IDs below `vocab_size`.

    It is equal for tokenizers of any type in which those IDs are the same tokens, such as a SentencePiece .model and
    its Hugging Face form with more tokens.
    """
    return sha256_of(sorted((id, token) for token, id in vocabulary.items() if id < vocab_size))


def sha256_of(value: object) -> str:
    """Return the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
