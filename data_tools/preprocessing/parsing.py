"""Lines and rows become texts with their languages."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.tokenized import TokenFile
from data_tools.preprocessing.batches import FileRange
from data_tools.preprocessing.conversations import ChatTemplate
from data_tools.preprocessing.long_documents import LongString, without_long_strings
from data_tools.preprocessing.tagging import SPAN_KEYS, DetectedLanguages, LanguageSpans, TaggedText, Tagger
from moelpr.data.text.documents import BadLine, is_blank, parse
from moelpr.data.text.filters import Filter
from moelpr.data.tokenizers.base import Piece


class Text(NamedTuple):
    """A text of a document, with its tokens if it must be encoded in pieces.

    Attributes:
        tagged: The text and its languages; of a text that is too long for memory, its first part.
        on_disk: The complete text if it is too long for memory.
        tokens: Tokens of a long text, without those that the tokenizer adds; all tokens of a text on disk.
        num_bytes: UTF-8 size of a text on disk.
        turns: Of a conversation, start and end of the assistant's turns, in characters.
        is_counted: Of a conversation, which tokens count in the loss, uint8 [tokens].
    """

    tagged: TaggedText
    on_disk: LongString | None = None
    tokens: Piece | TokenFile | None = None
    num_bytes: int = 0
    turns: list[tuple[int, int]] | None = None
    is_counted: NDArray[np.uint8] | None = None

    def parts(self) -> Iterable[str]:
        return [self.tagged.text] if self.on_disk is None else self.on_disk.parts()

    def json_line(self) -> Iterator[bytes]:
        """Yield the parts of the text's JSON line; its language is that of most of its characters."""
        characters: Counter[str] = Counter()
        for name, length in self.tagged.spans:
            characters[name] += length
        [(language, _)] = characters.most_common(1)
        yield b'{"text": "'
        for part in self.parts():
            yield json.dumps(part, ensure_ascii=False)[1:-1].encode()
        yield f'", "lang": {json.dumps(language, ensure_ascii=False)}}}\n'.encode()


@dataclass(frozen=True)
class DocumentParser:
    """Reads the texts of lines and rows.

    Attributes:
        tagger: Assigns languages to texts.
        keys: For each dataset, the keys of the texts, one per corpus.
        chat: Makes texts of conversations; None if the keys have texts.
        filter: Which documents are kept; None: all.
    """

    tagger: Tagger
    keys: list[list[str]]
    chat: ChatTemplate | None = None
    filter: Filter | None = None

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

    def texts(self, item: bytes | dict[str, Any] | FileRange, dataset: int) -> list[Text] | None:
        """Return the texts of a line or row, one per corpus; None for a blank line, nothing if it is filtered out.

        Raises:
            BadLine: The line can't be used.
        """
        keys = self.keys[dataset]
        long_strings: dict[str, LongString] = {}
        if isinstance(item, FileRange):
            if self.chat is not None:
                raise BadLine("a conversation of more than 16 MiB; remove it")
            item, long_strings = without_long_strings(item)
        if isinstance(item, bytes):
            if is_blank(item):
                return None
            of_spans = SPAN_KEYS if isinstance(self.tagger, LanguageSpans) else ()
            of_filter = self.filter.columns if self.filter else ()
            item = parse(item, [*keys, *self.tagger.columns(), *of_spans, *of_filter])
        if self.filter is not None and not self.filter.keeps(item):
            return []
        if self.chat is not None:
            return self._conversations(self.chat, item, dataset, keys)
        if not long_strings:
            return [Text(tagged) for tagged in self.tagger.texts(item, dataset, keys)]
        if isinstance(self.tagger, LanguageSpans):
            raise BadLine("a span of more than a million bytes in a long line; split it")
        texts = [long_strings.get(value) if isinstance(value := item.get(key), str) else None for key in keys]
        for key, text in zip(keys, texts, strict=True):
            if text is not None:
                item[key] = next(text.parts())  # its language is detected in its first part
        found = [Text(*pair) for pair in zip(self.tagger.texts(item, dataset, keys), texts, strict=True)]
        is_by_line = isinstance(self.tagger, DetectedLanguages) and self.tagger.by_line
        if any(text.on_disk is not None and (is_by_line or len(text.tagged.spans) > 1) for text in found):
            raise BadLine("a long text can't have a language for each of its lines; split it")
        return found

    def _conversations(self, chat: ChatTemplate, item: dict[str, Any], dataset: int, keys: list[str]) -> list[Text]:
        rendered = [chat.render(item, key) for key in keys]
        contents = item | {key: found.contents for key, found in zip(keys, rendered, strict=True)}
        tagged = self.tagger.texts(contents, dataset, keys)
        languages = [text.spans[0][0] for text in tagged]  # the template's own words are no language
        return [
            Text(TaggedText(found.text, [(language, len(found.text))]), turns=found.turns)
            for found, language in zip(rendered, languages, strict=True)
        ]


@dataclass(frozen=True)
class RandomShare:
    """A random share of all documents, for validation.

    Only a document's text decides, so the order and the number of jobs do not matter, and copies stay together.

    Attributes:
        share: Fraction of the documents, 0 to 1.
        seed: Random seed of the choice.
    """

    share: float = 0.0
    seed: int = 0

    def __contains__(self, text: Iterable[str]) -> bool:
        """Whether a document, whose text comes in parts, is in the share."""
        if not self.share:
            return False
        digest = hashlib.blake2b(digest_size=8, salt=self.seed.to_bytes(16, "little"))
        for characters in text:
            digest.update(characters.encode())
        return int.from_bytes(digest.digest(), "little") < self.share * (1 << 64)
