"""Several models side by side on the same text, loaded one after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelpr.evaluate.generate import continue_prompts
from moelpr.evaluate.models import open_model, read_max_positions
from moelpr.evaluate.parts import Parts, fingerprint_model, fingerprint_text
from moelpr.evaluate.perplexity import LanguageScore, Settings, score_each
from moelpr.evaluate.tables import Table


@dataclass(frozen=True)
class ModelResult:
    """What one model does on each language."""

    scores: dict[str, LanguageScore]
    continuations: dict[str, str]  # empty where no prompts were given

    @property
    def bits_per_byte(self) -> dict[str, float]:
        return {language: score.bits_per_byte for language, score in self.scores.items()}

    @property
    def original_expert_share(self) -> dict[str, dict[str, Any]] | None:
        """Language -> {"overall", "per_layer"}; None for a dense model."""
        shares = {
            language: score.routing.original_expert_share
            for language, score in self.scores.items()
            if score.routing is not None
        }
        return shares or None


def compare_models(
    models: Mapping[str, Path],
    documents: Mapping[str, Sequence[str]],
    settings: Settings | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    device: str = "auto",
    dtype: str = "auto",
    parts: Parts | None = None,
) -> dict[str, ModelResult]:
    """Score every model (name -> directory) on every language (-> texts), and let each continue the prompts.

    All models see windows of the same length, so that none gets more context than another. Megatron checkpoints
    continue no prompts. parts: where results are kept as they come, and where those of an earlier run are taken from.
    """
    settings = (settings or Settings()).resolve({name: read_max_positions(path) for name, path in models.items()})
    texts = {language: fingerprint_text(group) for language, group in documents.items()}
    results = {}
    for name, directory in models.items():
        of = {"model": fingerprint_model(directory), "dtype": dtype, **settings.identity}
        kept = _read_kept(parts, name, {language: of | {"text": text} for language, text in texts.items()})
        missing = {language: documents[language] for language in documents if language not in kept}
        continuations: dict[str, str] = {}
        if missing or prompts:
            with open_model(directory, device, dtype) as loaded:
                for language, score in score_each(loaded, missing, settings, name=name):
                    kept[language] = score
                    if parts:
                        parts.write(name, language, of | {"text": texts[language]}, score.to_json())
                if prompts:
                    continuations = continue_prompts(
                        loaded, prompts, max_new_tokens=max_new_tokens, temperature=temperature
                    )
        results[name] = ModelResult({language: kept[language] for language in documents}, continuations)
    return results


def _read_kept(parts: Parts | None, model: str, wanted: dict[str, dict[str, Any]]) -> dict[str, LanguageScore]:
    """What an earlier run has measured of the wanted (language -> what its part must be of)."""
    found = {language: parts.read(model, language, of) for language, of in wanted.items()} if parts else {}
    return {language: LanguageScore.from_json(result) for language, result in found.items() if result is not None}


def group_means(values: Mapping[str, float], original: Sequence[str]) -> dict[str, float]:
    """Plain means over the original and over the expanded languages."""
    groups = {
        "original": [value for language, value in values.items() if language in original],
        "expanded": [value for language, value in values.items() if language not in original],
    }
    return {f"mean {group}": sum(members) / len(members) for group, members in groups.items() if members}


def markdown_table(rows: Mapping[str, Mapping[str, float]], digits: int = 3) -> str:
    """Rows (name -> column -> number) as a Markdown table with aligned columns."""
    columns = list(next(iter(rows.values())))
    cells = [[name, *(f"{values[column]:.{digits}f}" for column in columns)] for name, values in rows.items()]
    return Table("", ["model", *columns], cells).markdown()
