"""The language of a text: by a fastText model, such as GlotLID or lid.176, or by py3langid."""

from pathlib import Path
from typing import Any

from data_tools.preprocessing.tagging import UNDETECTED, Detector
from moelpr.languages import canonical
from moelpr.process.errors import UserError, first_line
from moelpr.process.versions import install_command

PY3LANGID = "py3langid"


class FastTextModel:
    """A fastText model whose labels are languages.

    Args:
        path: The model's file, .bin or .ftz.
        min_confidence: Probability below which a language is uncertain.
    """

    def __init__(self, path: Path, min_confidence: float) -> None:
        try:
            import fasttext
        except ImportError:
            raise UserError(f"fastText's models need fasttext-predict; run {install_command('clean')}") from None
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
