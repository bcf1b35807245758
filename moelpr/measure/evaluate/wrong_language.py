"""How often a model continues a text in another language, by language identification.

The documents' own continuations are measured too: what seems wrong there is the identifier's error, not a model's.
"""

import math
from collections.abc import Mapping, Sequence

from moelpr.data.text.language_id import UNDETECTED, Detector, FastTextModel
from moelpr.measure.report.evaluation_files import WrongLanguage
from moelpr.measure.report.numbers import Interval

MIN_CONFIDENCE = 0.5
# Fewer letters do not show a language, nor does text that is mostly code or numbers.
_MIN_LETTERS, _MIN_LETTER_SHARE = 20, 0.7
# Languages that a line of text does not tell apart.
_ALIKE = ({"no", "nb", "nn", "da"}, {"hr", "bs", "sr-Latn", "sh"}, {"id", "ms"}, {"fil", "tl"})
_Z = 1.96  # standard deviations of a 95% interval


def wrong_language(
    identifier: Detector | FastTextModel, continued: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, dict[str, WrongLanguage]]:
    """The rates for each language that the identifier knows, and for each writer of continuations.

    Args:
        continued: Language → writer → texts.
    """
    return {
        language: {writer: _rate(identifier, language, texts) for writer, texts in by_writer.items()}
        for language, by_writer in continued.items()
        if language in identifier.languages
    }


def _rate(identifier: Detector | FastTextModel, language: str, texts: Sequence[str]) -> WrongLanguage:
    right = next((alike for alike in _ALIKE if language in alike), {language})
    languages = [identifier.language(text) for text in texts if _shows_a_language(text)]
    decided = [name for name in languages if name != UNDETECTED]
    wrong = sum(name not in right for name in decided)
    return WrongLanguage(wilson(wrong, len(decided)), len(decided), len(texts) - len(decided))


def _shows_a_language(text: str) -> bool:
    letters = sum(character.isalpha() for character in text)
    return letters >= _MIN_LETTERS and letters >= _MIN_LETTER_SHARE * len("".join(text.split()))


def wilson(count: int, total: int) -> Interval:
    """A fraction with its 95% confidence interval, by Wilson's score: right also for few texts and for 0."""
    if not total:
        return Interval(math.nan)
    share, square = count / total, _Z**2 / total
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / total + square / total / 4) / (1 + square)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))
