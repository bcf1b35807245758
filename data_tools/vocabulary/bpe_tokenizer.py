"""Tokenizers that can be extended: byte-level BPE (Qwen, Llama 3), and SentencePiece BPE with byte fallback (Llama 2).

Both are a tokenizer.json of the `tokenizers` library that can write any text and lists its merges.
"""

import json
from collections.abc import Iterable
from itertools import groupby

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import Split

from data_tools.vocabulary.merges import Character, NewToken
from moelpr.base.errors import UserError

_SPACE = "\u2581"  # SentencePiece's
# SentencePiece keeps no boundaries of words in a tokenizer, but its tokens begin with a space or contain none, and its
# trainer joins no letter with anything else. Other characters can become tokens, but are not joined.
_SENTENCEPIECE_WORDS = Split(Regex(rf"{_SPACE}?[\p{{L}}\p{{M}}]+|[^\p{{L}}\p{{M}}{_SPACE}]"), "removed", invert=True)


class BpeTokenizer:
    """A tokenizer that can be extended.

    Args:
        source: Content of its tokenizer.json.
        name: Of the tokenizer, for messages.

    Attributes:
        texts: Text of each token, added tokens included, by ID.
        characters: Characters without a token that have occurred, by negative symbol.
        first_new_id: The highest ID + 1.
    """

    def __init__(self, source: str, name: str) -> None:
        self._parts = json.loads(source)
        model = self._parts["model"]
        before_words = json.dumps([self._parts["normalizer"], self._parts["pre_tokenizer"]])
        self._has_byte_fallback = bool(model.get("byte_fallback"))
        expected = "a byte-level BPE, or a SentencePiece BPE with byte fallback"
        if model["type"] != "BPE":
            raise UserError(f"the tokenizer {name} is of the kind {model['type']}; expected {expected}")
        if not self._has_byte_fallback and '"type": "ByteLevel"' not in before_words:
            raise UserError(f"the tokenizer {name} is a BPE of characters, not of bytes; expected {expected}")
        if model["dropout"]:
            raise UserError(f"the tokenizer {name} has dropout, which makes tokens random; set it to null")
        if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
            raise UserError(f"the tokenizer {name} marks parts of words with a prefix or suffix; expected {expected}")
        self._added: dict[str, int] = {token["content"]: token["id"] for token in self._parts["added_tokens"]}
        self._vocabulary: dict[str, int] = model["vocab"] | self._added
        self.texts = {id: text for text, id in self._vocabulary.items()}
        self.first_new_id = max(self.texts) + 1
        self.characters: dict[int, Character] = {}
        self._symbol_of: dict[str, int] = {}
        # A word that is a token is taken as a whole, even if merges do not lead to it.
        self._ignores_merges = bool(model.get("ignore_merges"))
        bytes_of = {model["vocab"].get(f"<0x{byte:02X}>"): byte for byte in range(256)}
        if self._has_byte_fallback and len(bytes_of.keys() - {None}) < 256:
            raise UserError(f"the tokenizer {name} lacks tokens for some of the 256 bytes; expected {expected}")
        self._byte_of: dict[int, int] = bytes_of  # tokens of byte fallback
        self._tokenizer = Tokenizer.from_str(source)

    def words(self, text: str) -> list[str]:
        """Split a text into words, as the vocabulary writes them; no new token crosses their boundaries."""
        text = self._normalized(text)
        splitter = self._tokenizer.pre_tokenizer
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        if not self._has_byte_fallback:
            return words
        return [part for word in words for part, _ in _SENTENCEPIECE_WORDS.pre_tokenize_str(word)]

    def taken_whole(self, text: str) -> Iterable[str]:
        """Return what becomes one token without any merge, once it is in the vocabulary."""
        if self._ignores_merges:
            return self.words(text)
        return self._normalized(text) if self._has_byte_fallback else ()

    def symbols(self, word: str) -> list[int]:
        """Encode a word: IDs of tokens, and a negative symbol for each character that has none; [] if it can't be."""
        ids = [token.id for token in self._tokenizer.model.tokenize(word)]
        if not self._has_byte_fallback:
            # Some vocabularies lack a few bytes, which the library leaves out: what is left are no neighbors.
            return ids if sum(len(self.texts[id]) for id in ids) == len(word) else []
        symbols: list[int] = []
        for is_bytes, run in groupby(ids, self._byte_of.__contains__):
            if is_bytes:
                text = bytes(self._byte_of[id] for id in run).decode()
                symbols += map(self._symbol, text)
            else:
                symbols += run
        return symbols

    def extended(self, new: list[NewToken]) -> str:
        """Return the content of a tokenizer.json with new tokens."""
        model = self._parts["model"]
        # With added tokens, which would get other IDs if they were above those of the model.
        vocabulary = self._vocabulary | {token.text: id for id, token in enumerate(new, self.first_new_id)}
        merges = [*model["merges"], *(list(token.merge) for token in new if token.merge is not None)]
        ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        parts = self._parts | {"model": model | {"vocab": ordered, "merges": merges}}
        return json.dumps(parts, ensure_ascii=False, indent=2)

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _symbol(self, character: str) -> int:
        if character not in self._symbol_of:
            symbol = -2 - len(self._symbol_of)
            ids = [self._vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()]
            self._symbol_of[character] = symbol
            self.characters[symbol] = Character(character, ids)
        return self._symbol_of[character]
