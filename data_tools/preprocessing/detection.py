"""Languages found by py3langid, and compared with those that were stated."""

import difflib
from dataclasses import dataclass
from typing import Any

from data_tools.preprocessing.languages import UNDETECTED, TaggedText, merged
from moelpr.documents import text_of
from moelpr.errors import UserError

# py3langid walks over bytes in Python, some 5 MB/s; a page of text settles what language it is.
LOOKED_AT_CHARACTERS = 4096


class Detector:
    """Tells a text's language.

    Args:
        languages: those to choose from; empty: all that py3langid knows.
        floor: confidence below which there is no answer, 0 to 1.

    Raises:
        UserError: py3langid is not installed or doesn't know one of the languages.
    """

    def __init__(self, languages: frozenset[str], floor: float) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise UserError(
                "py3langid, which detects languages, is not installed; pip install 'moelpr[language-id]'"
            ) from None
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = self._identifier.labels
        if unknown := sorted(languages - set(known)):
            near = difflib.get_close_matches(unknown[0], known, 3, 0)
            raise UserError(
                f"py3langid knows no language {unknown[0]}; it knows ISO 639-1 codes such as {', '.join(near)}"
            )
        if languages:
            self._identifier.set_languages(languages)
        self._floor = floor

    def language(self, text: str) -> str:
        """The language of a text's first page, `UNDETECTED` where it is uncertain."""
        name, confidence = self._identifier.classify(text[:LOOKED_AT_CHARACTERS])
        return str(name) if confidence >= self._floor else UNDETECTED


@dataclass(frozen=True)
class DetectedLanguages:
    """Each text is of the language it is found to be in.

    Attributes:
        by_line: each line has a language of its own; where that is uncertain, the whole text's.
        skips_undetected: texts of uncertain language are left out.
    """

    detector: Detector
    by_line: bool

    def texts(self, document: dict[str, Any], dataset: int, keys: list[str]) -> list[TaggedText]:
        return [self._tagged(text_of(document, key)) for key in keys]

    def columns(self) -> list[str]:
        return []

    def _tagged(self, text: str) -> TaggedText:
        whole = self.detector.language(text)
        if not self.by_line:
            return TaggedText(text, [(whole, len(text))])
        spans = []
        for line in text.splitlines(keepends=True):
            found = self.detector.language(line)
            spans.append((whole if found == UNDETECTED else found, len(line)))
        return TaggedText(text, merged(spans))
