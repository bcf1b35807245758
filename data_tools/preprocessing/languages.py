"""Where a document's languages come from, and which of them are original."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from moelpr.documents import BadLine, json_type, text_of
from moelpr.errors import UserError

UNDETECTED = "und"  # ISO 639-2's code for undetermined


@dataclass(frozen=True)
class Bits:
    """Which languages are original.

    Attributes:
        original: languages whose bit is 1.
        expanded: languages whose bit is 0; empty: all others.
    """

    original: frozenset[str]
    expanded: frozenset[str]

    @classmethod
    def from_names(cls, original: str | None, expanded: str | None) -> "Bits":
        sets = [
            frozenset(name.strip() for name in (names or "").split(",") if name.strip())
            for names in (original, expanded)
        ]
        if both := sets[0] & sets[1]:
            raise UserError(f"{', '.join(sorted(both))} can't be both an original and an expanded language")
        return cls(*sets)

    def check(self, name: str) -> None:
        if self.expanded and name not in self.original and name not in self.expanded:
            raise BadLine(f'the language "{name[:40]}" is neither in --original-languages nor in --expanded-languages')


class TaggedText(NamedTuple):
    """A text and the language of each part of it.

    Attributes:
        spans: languages with their number of characters, in order; a text in one language has a single span.
    """

    text: str
    spans: list[tuple[str, int]]


class Tagger(Protocol):
    """Gives a document's texts their languages; lives in the workers."""

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        """The texts under `keys`.

        Raises:
            BadLine: the document lacks a text or a language.
        """
        ...

    def columns(self) -> list[str]:
        """Keys it reads beside those of the texts."""
        ...


@dataclass(frozen=True)
class OneLanguage:
    """All documents of a dataset are of one language.

    Attributes:
        names: by dataset.
    """

    names: list[str]

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        return [_whole(text_of(document, key), self.names[dataset]) for key in keys]

    def columns(self) -> list[str]:
        return []


@dataclass(frozen=True)
class LanguageKey:
    """Each document names its language.

    Attributes:
        key: where.
    """

    key: str
    bits: Bits

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        name = document.get(self.key)
        if not isinstance(name, str):
            found = (
                f"holds {json.dumps(name, default=str)[:40]}, not a language" if self.key in document else "is missing"
            )
            raise BadLine(f'the language key "{self.key}" {found}')
        self.bits.check(name)
        return [_whole(text_of(document, key), name) for key in keys]

    def columns(self) -> list[str]:
        return [self.key]


@dataclass(frozen=True)
class LanguageSpans:
    """Each document is a list of spans, {"text": …, "lang": …}, which together are its text.

    Attributes:
        key: where the list is.
    """

    key: str
    bits: Bits

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        if self.key not in document:
            raise BadLine(f'the key "{self.key}" is missing')
        spans = document[self.key]
        if not isinstance(spans, list):
            raise BadLine(f'the key "{self.key}" holds {json_type(spans)}, not a list of spans')
        texts: list[str] = []
        languages: list[tuple[str, int]] = []
        for number, span in enumerate(spans, 1):
            try:
                if not isinstance(span, dict):
                    raise BadLine(f'{json_type(span)}, not an object with "text" and "lang"')
                text, name = text_of(span, "text"), text_of(span, "lang")
                self.bits.check(name)
            except BadLine as error:
                raise BadLine(f"span {number}: {error}") from None
            texts.append(text)
            if text:
                languages.append((name, len(text)))
        return [TaggedText("".join(texts), merged(languages))]

    def columns(self) -> list[str]:
        return [self.key]


def _whole(text: str, language: str) -> TaggedText:
    return TaggedText(text, [(language, len(text))])


def merged(spans: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Neighbours of one language as one span; no span at all becomes an empty one of no known language."""
    merged: list[tuple[str, int]] = []
    for name, length in spans:
        if merged and merged[-1][0] == name:
            merged[-1] = (name, merged[-1][1] + length)
        else:
            merged.append((name, length))
    return merged or [(UNDETECTED, 0)]
