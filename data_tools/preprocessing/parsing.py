"""Lines and rows become texts with their languages."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.batches import DOCUMENT_BYTES, LongLine
from data_tools.preprocessing.conversations import ChatTemplate
from data_tools.preprocessing.tagging import SPAN_KEYS, LanguageSpans, TaggedText, Tagger
from moelpr.data.text.documents import BadLine, is_blank, parse
from moelpr.data.text.filters import Filter
from moelpr.data.tokenizers.base import Piece


class LongDocument(BadLine):
    """A document of more than DOCUMENT_BYTES, which is left out."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"a document of {num_bytes:,} bytes, more than {DOCUMENT_BYTES:,}")


class Text(NamedTuple):
    """A text of a document."""

    tagged: TaggedText
    # start and end of the assistant's turns in a conversation, in characters
    turns: list[tuple[int, int]] | None = None
    tokens: Piece | None = None  # the tokens of a conversation
    is_counted: NDArray[np.uint8] | None = None  # tokens of a conversation that count in the loss, uint8 [tokens]

    def json_line(self) -> bytes:
        """Return the text's JSON line; its language is that of most of its characters."""
        characters: Counter[str] = Counter()
        for name, length in self.tagged.spans:
            characters[name] += length
        [(language, _)] = characters.most_common(1)
        return f"{json.dumps({'text': self.tagged.text, 'lang': language}, ensure_ascii=False)}\n".encode()


@dataclass(frozen=True)
class DocumentParser:
    """Reads the texts of lines and rows."""

    tagger: Tagger  # assigns languages to texts
    keys: list[list[str]]  # for each dataset, the keys of the texts, one per corpus
    chat: ChatTemplate | None = None  # makes texts of conversations; None if the keys have texts
    filter: Filter | None = None  # the documents that are kept; None: all

    def columns(self) -> list[list[str]]:
        """Return the keys that are read, for each dataset."""
        has_text = not isinstance(self.tagger, LanguageSpans)  # spans have the text
        more = [*self.tagger.columns(), *(self.filter.columns if self.filter else ())]
        return [list(dict.fromkeys([*(keys if has_text else ()), *more])) for keys in self.keys]

    def text_columns(self) -> list[list[str]]:
        """Return those of the columns that must be text, for each dataset."""
        if self.chat is not None or isinstance(self.tagger, LanguageSpans):
            return [[] for _ in self.keys]
        return [[*keys, *self.tagger.columns()] for keys in self.keys]

    def texts(self, item: bytes | dict[str, Any] | LongLine, dataset: int) -> list[Text] | None:
        """Return the texts of a line or row, one per corpus; None for a blank line, nothing if it is filtered out.

        Raises:
            BadLine: The line can't be used, or is too long.
        """
        keys = self.keys[dataset]
        if isinstance(item, LongLine):
            raise LongDocument(item.num_bytes)
        if isinstance(item, bytes):
            if is_blank(item):
                return None
            of_spans = SPAN_KEYS if isinstance(self.tagger, LanguageSpans) else ()
            of_filter = self.filter.columns if self.filter else ()
            item = parse(item, [*keys, *self.tagger.columns(), *of_spans, *of_filter])
        if self.filter is not None and not self.filter.keeps(item):
            return []
        if self.chat is not None:
            texts = self._conversations(self.chat, item, dataset, keys)
        else:
            texts = [Text(tagged) for tagged in self.tagger.texts(item, dataset, keys)]
        for text in texts:
            if len(text.tagged.text) > DOCUMENT_BYTES:  # in a row
                raise LongDocument(len(text.tagged.text.encode()))
        return texts

    def _conversations(self, chat: ChatTemplate, item: dict[str, Any], dataset: int, keys: list[str]) -> list[Text]:
        rendered = [chat.render(item, key) for key in keys]
        contents = item | {key: conversation.contents for key, conversation in zip(keys, rendered, strict=True)}
        tagged = self.tagger.texts(contents, dataset, keys)
        languages = [text.spans[0][0] for text in tagged]  # the template's own words are no language
        return [
            Text(TaggedText(conversation.text, [(language, len(conversation.text))]), turns=conversation.turns)
            for conversation, language in zip(rendered, languages, strict=True)
        ]


@dataclass(frozen=True)
class RandomShare:
    """A random share of all documents, for validation.

    Only a document's text decides, so the order and the number of jobs do not matter, and copies stay together.
    """

    share: float = 0.0  # fraction of the documents, 0 to 1
    seed: int = 0  # random seed of the choice

    def __contains__(self, text: str) -> bool:
        """Whether a document with this text is in the share."""
        if not self.share:
            return False
        digest = hashlib.blake2b(text.encode(), digest_size=8, salt=self.seed.to_bytes(16, "little"))
        return int.from_bytes(digest.digest(), "little") < self.share * (1 << 64)
