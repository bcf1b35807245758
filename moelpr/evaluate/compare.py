"""Several models side by side on the same text, loaded one after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelpr.evaluate.generate import continue_prompts
from moelpr.evaluate.models import load_model, read_max_positions
from moelpr.evaluate.perplexity import LanguageScore, Settings, score


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
) -> dict[str, ModelResult]:
    """Score every model (name -> HF directory) on every language (-> texts), and let each continue the prompts.

    All models see windows of the same length, so that none gets more context than another.
    """
    settings = (settings or Settings()).resolve({name: read_max_positions(path) for name, path in models.items()})
    results = {}
    for name, directory in models.items():
        loaded = load_model(directory, device, dtype)
        scores = score(loaded, documents, settings, name=name)
        continuations = {}
        if prompts:
            continuations = continue_prompts(loaded, prompts, max_new_tokens=max_new_tokens, temperature=temperature)
        results[name] = ModelResult(scores, continuations)
    return results


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
    cells = [["model", *columns]]
    cells += [[name, *(f"{values[column]:.{digits}f}" for column in columns)] for name, values in rows.items()]
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        lines.append(
            "| "
            + " | ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
            + " |"
        )
    return "\n".join(lines)
