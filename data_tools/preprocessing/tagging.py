"""The language of each part of a document, stated or detected, and the two groups of languages."""

import json
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, Self

from moelpr.base.errors import UserError
from moelpr.base.languages import canonical
from moelpr.data.manifest import Bit
from moelpr.data.text.documents import BadLine, json_type, text_of
from moelpr.data.text.language_id import UNDETECTED, Detector


@dataclass(frozen=True)
class LanguageGroups:
    """The original and the expanded languages."""

    original: frozenset[str]  # languages whose bit is 1
    expanded: frozenset[str]  # languages whose bit is 0; if empty, all other languages

    @classmethod
    def from_names(cls, original: str | None, expanded: str | None) -> Self:
        """Parse the values of --original-languages and --expanded-languages."""
        lists = [(names or "").split(",") for names in (original, expanded)]
        sets = [frozenset(canonical(name.strip()) for name in names if name.strip()) for names in lists]
        if both := sets[0] & sets[1]:
            raise UserError(f"{', '.join(sorted(both))} can't be in both --original-languages and --expanded-languages")
        return cls(*sets)

    def bit(self, name: str) -> Bit:
        """Return the group of a language."""
        return "original" if name in self.original else "expanded"

    def checked(self, name: str) -> str:
        """Return the canonical code of a language; raise `BadLine` if it is neither original nor expanded."""
        code = canonical(name)
        if self.expanded and code not in self.original and code not in self.expanded:
            raise BadLine(f'the language "{name[:40]}" is neither in --original-languages nor in --expanded-languages')
        return code


class TaggedText(NamedTuple):
    """A text and its spans in order: (language, number of characters); a text in one language has a single span."""

    text: str
    spans: list[tuple[str, int]]


class Tagger:
    """Assigns languages to the texts of a document; runs in the workers."""

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        """Return the tagged texts under `keys`.

        Raises:
            BadLine: A text or a language is missing or invalid.
        """
        raise NotImplementedError

    def columns(self) -> list[str]:
        """Return the keys to read in addition to those of the texts."""
        return [self.key] if hasattr(self, "key") else []


@dataclass(frozen=True)
class OneLanguage(Tagger):
    """One language per dataset, listed in `names`."""

    names: list[str]

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        return [_one_span(text_of(document, key), self.names[dataset]) for key in keys]


@dataclass(frozen=True)
class LanguageKey(Tagger):
    """Each document states its language under `key`."""

    key: str
    groups: LanguageGroups

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        name = document.get(self.key)
        if not isinstance(name, str):
            value = json.dumps(name, default=str)[:40]
            problem = f"contains {value}, not a language" if self.key in document else "is missing"
            raise BadLine(f'the language key "{self.key}" {problem}')
        language = self.groups.checked(text_of(document, self.key))
        return [_one_span(text_of(document, key), language) for key in keys]


SPAN_KEYS = ("text", "lang")


@dataclass(frozen=True)
class LanguageSpans(Tagger):
    """Each document is a list of spans, {"text": …, "lang": …}, under `key`; concatenated they are its text."""

    key: str
    groups: LanguageGroups

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        if self.key not in document:
            raise BadLine(f'the key "{self.key}" is missing')
        spans = document[self.key]
        if not isinstance(spans, list):
            raise BadLine(f'the key "{self.key}" contains {json_type(spans)}, not a list of spans')
        texts, languages = [], []
        for number, span in enumerate(spans, 1):
            try:
                if not isinstance(span, dict):
                    raise BadLine(f'{json_type(span)}, not an object with "text" and "lang"')
                text, name = (text_of(span, key) for key in SPAN_KEYS)
                name = self.groups.checked(name)
            except BadLine as error:
                raise BadLine(f"span {number}: {error}") from None
            texts.append(text)
            if text:
                languages.append((name, len(text)))
        return [TaggedText("".join(texts), _merge(languages))]


@dataclass(frozen=True)
class DetectedLanguages(Tagger):
    """Each text, or with `by_line` each line, has its detected language; an uncertain line takes that of the text."""

    detector: Detector
    by_line: bool

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        tagged = []
        for text in (text_of(document, key) for key in keys):
            language = self.detector.language(text)
            lines = text.splitlines(keepends=True) if self.by_line else []
            pieces = [(self.detector.language(line), len(line)) for line in lines]
            spans = [(language if name == UNDETECTED else name, length) for name, length in pieces]
            tagged.append(TaggedText(text, _merge(spans)) if self.by_line else _one_span(text, language))
        return tagged


def _one_span(text: str, language: str) -> TaggedText:
    return TaggedText(text, [(language, len(text))])


def _merge(spans: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Merge neighboring spans of one language; without any span, return an empty one of undetermined language."""
    by_language = groupby(spans, key=itemgetter(0))
    return [(name, sum(length for _, length in group)) for name, group in by_language] or [(UNDETECTED, 0)]
