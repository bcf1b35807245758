"""Compare the tokenizer of a corpus with that of a model."""

import os
from enum import StrEnum
from pathlib import Path

from moelpr.base.errors import UserError
from moelpr.data.manifest import TokenizerRecord
from moelpr.data.tokenizers.base import vocabulary_checksum
from moelpr.data.tokenizers.loading import load_tokenizer
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE, VocabularyExtension


class TokenizerMatch(StrEnum):
    """How a corpus's tokenizer compares with that of a model."""

    SAME = "same"  # every text gets the same IDs
    SAME_TOKENS = "same tokens"  # every ID is the same token, but a text may be split differently
    NOT_EXTENDED = "not extended"  # every ID is the same token, but the model's new tokens are missing
    DIFFERENT = "different"  # an ID may be a different token
    UNKNOWN = "unknown"  # the model's folder has no tokenizer that can be loaded


def compare_tokenizers(corpus: TokenizerRecord, folder: str | os.PathLike[str]) -> TokenizerMatch:
    """Compare a corpus's tokenizer with the one in a Hugging Face folder, such as a checkpoint's `hf/`.

    Tokenizers of one type are the same if their fingerprints are. Otherwise, also between a .model file and the
    tokenizer.json made from it, the tokens of the corpus's IDs are compared. An extended tokenizer keeps all old IDs,
    but would write the text of the corpus with its new tokens, which a model then never sees.
    """
    lacks_new_tokens = (
        Path(folder, VOCABULARY_EXTENSION_FILE).is_file()
        and corpus.vocab_size <= VocabularyExtension.read(Path(folder)).first_new_id
    )
    match = TokenizerMatch.UNKNOWN
    for name in ("", "tokenizer.model", "spiece.model"):
        type, path = "SentencePieceTokenizer" if name else "HuggingFaceTokenizer", Path(folder, name)
        try:
            tokenizer = load_tokenizer(type, str(path)) if path.exists() else None
        except UserError:
            continue
        if tokenizer is None:
            continue
        if type == corpus.type and tokenizer.fingerprint() == corpus.fingerprint:
            return TokenizerMatch.SAME
        if vocabulary_checksum(tokenizer.vocabulary(), corpus.vocab_size) == corpus.vocabulary_sha256:
            match = TokenizerMatch.NOT_EXTENDED if lacks_new_tokens else TokenizerMatch.SAME_TOKENS
        elif match is TokenizerMatch.UNKNOWN:
            match = TokenizerMatch.DIFFERENT
    return match
