"""The language of a text: by a fastText model, such as GlotLID or lid.176, or by py3langid."""

import difflib
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError, first_line
from moelpr.base.languages import canonical
from moelpr.base.versions import require_package

PY3LANGID = "py3langid"
UNDETECTED = "und"  # ISO 639-2's code for undetermined
# py3langid processes about 5 MB/s in Python; a page of text is enough to detect its language.
_DETECTION_CHARACTERS = 4096


class Detector:
    """Detects the language of a text with py3langid.

    Args:
        languages: Languages to choose from; if empty, all that py3langid supports.
        min_confidence: Confidence below which a language is uncertain, 0 to 1.

    Raises:
        UserError: py3langid is not installed or does not support one of the languages.
    """

    def __init__(self, languages: frozenset[str], min_confidence: float) -> None:
        require_package("py3langid", "language-id")
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        supported = {canonical(label): label for label in self._identifier.labels}
        if unsupported := sorted(languages - supported.keys()):
            near = ", ".join(difflib.get_close_matches(unsupported[0], supported, 3, 0))
            raise UserError(f"py3langid does not support language {unsupported[0]}; use ISO 639-1 codes such as {near}")
        self.languages = set(supported)
        if languages:
            self._identifier.set_languages({supported[language] for language in languages})
        self._min_confidence = min_confidence
        # A text without letters is equally likely in every language: 1/2 for two, and more if one has two scripts.
        _, self._no_confidence = self._identifier.classify("")

    def language(self, text: str) -> str:
        """Return the language of a text's first page, or `UNDETECTED` if it is uncertain."""
        name, confidence = self._identifier.classify(text[:_DETECTION_CHARACTERS])
        is_certain = confidence >= self._min_confidence and abs(confidence - self._no_confidence) > 1e-6
        return canonical(str(name)) if is_certain else UNDETECTED


class FastTextModel:
    """A fastText model whose labels are languages.

    Args:
        path: The model's file, .bin or .ftz.
        min_confidence: Probability below which a language is uncertain.
    """

    def __init__(self, path: Path, min_confidence: float) -> None:
        require_package("fasttext", "language-id")
        import fasttext

        try:
            self._model = fasttext.load_model(str(path))
            labels, _ = self._model.predict("text", k=-1, threshold=-1.0)
        except (ValueError, MemoryError) as error:
            raise UserError(
                f"{path} is no fastText model of languages, or a damaged one ({first_line(error)}); pass GlotLID's "
                "model.bin or fastText's lid.176.ftz, or download it again"
            ) from None
        self._arguments = path, min_confidence
        self.languages = {canonical(label.removeprefix("__label__")) for label in labels}

    def __reduce__(self) -> Any:
        return FastTextModel, self._arguments

    def language(self, text: str) -> str:
        """Return the canonical code of a text's language, or `UNDETECTED` if it is uncertain."""
        labels, scores = self._model.predict(text.replace("\n", " "), k=1)
        is_certain = labels and scores[0] >= self._arguments[1]
        return canonical(labels[0].removeprefix("__label__")) if is_certain else UNDETECTED


def load_identifier(name: str, languages: frozenset[str], min_confidence: float) -> FastTextModel | Detector:
    """Load what --language-id names, and check that it knows `languages`."""
    if name == PY3LANGID:
        Detector(languages, min_confidence)
        return Detector(frozenset(), min_confidence)
    if not Path(name).is_file():
        raise UserError(
            f"there is no model {name}; --language-id takes {PY3LANGID}, or the path of a fastText model such as "
            "GlotLID's, which is not downloaded for you"
        )
    model = FastTextModel(Path(name).resolve(), min_confidence)
    if unknown := sorted(languages - model.languages):
        raise UserError(f"the model {name} does not know {unknown[0]}; remove it, or pass another model")
    return model
