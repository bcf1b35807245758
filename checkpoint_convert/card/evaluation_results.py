"""Adds evaluation results and metadata to a model card."""

import math
import re
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from pydantic.dataclasses import dataclass

from checkpoint_convert.card.front_matter import read_card, texts
from checkpoint_convert.hf.model_files import CARD_FILE
from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.languages import canonical, language_name
from moelpr.base.records import FOREIGN
from moelpr.measure.report.numbers import Interval, Measured, signed
from moelpr.model.families.hub import is_hub_name

METRIC_NAMES = {
    "bits_per_byte": "Bits per byte (lower is better)",
    "perplexity": "Perplexity per token",
    "accuracy": "Next-token accuracy",
}
_TASK = "text-generation"
_LANGUAGE = r"code|multilingual|[a-z]{2,3}([-_][A-Za-z0-9]+)*"
_REMEDY = (
    "pass results.json or harness.json of moelpr evaluate --output, or what it printed with --json; that of routing "
    "has no scores"
)


@dataclass(frozen=True, config=FOREIGN)
class Score:
    """A number; of a benchmark's, its 95% interval too, and its change against the first model with that of it."""

    value: float
    low: Measured = math.nan
    high: Measured = math.nan
    change: Interval | None = None

    @property
    def note(self) -> str:
        """What a benchmark's title says of it."""
        interval = Interval(self.value, self.low, self.high)
        parts = [f"95% interval {self.low:.1f} to {self.high:.1f}"] if interval.has_bounds else []
        return ", ".join(["", *parts, *([f"against the base {self.change.text(signed)}"] if self.change else [])])


@dataclass(frozen=True, config=FOREIGN)
class TextScores:
    """What a model scored on the held-out text of a language."""

    documents: int
    bits_per_byte: Score
    perplexity: Score
    accuracy: Score


@dataclass(frozen=True, config=FOREIGN)
class Benchmark:
    """How a benchmark was run."""

    metric: str
    num_fewshot: int


@dataclass(frozen=True, config=FOREIGN)
class EvaluatedModel:
    """A model with its scores on text (by language) or on benchmarks (by benchmark and language)."""

    directory: str
    languages: dict[str, TextScores] = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)


@dataclass(frozen=True, config=FOREIGN)
class Evaluation:
    """results.json or harness.json of moelpr evaluate, as far as a card needs it; `data` is the text of a language."""

    models: dict[str, EvaluatedModel]
    data: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)

    def results(self, model: str) -> Iterator[EvalResult]:
        """Every number of a model."""
        for language, found in self.models[model].languages.items():
            name = f"held-out {language_name(language)} text, {found.documents:,} documents"
            kind = Path(self.data.get(language, language)).stem
            for metric, title in METRIC_NAMES.items():
                value = getattr(found, metric).value
                yield EvalResult(_TASK, kind, name, metric, value, dataset_config=language, metric_name=title)
        for benchmark, scores in self.models[model].scores.items():
            run = self.benchmarks[benchmark]
            for language, score in scores.items():
                dataset = benchmark.lower(), f"{benchmark}, {language_name(language)}"
                title = f"{run.metric}, {run.num_fewshot} shots{score.note}"
                yield EvalResult(_TASK, *dataset, run.metric, score.value, dataset_config=language, metric_name=title)


def update_card(
    folder: Path,
    results: list[Path],
    evaluated: str | None = None,
    base_model: str | None = None,
    languages: list[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
) -> ModelCardData:
    """Add metadata to the card of an export; the text below it stays as it is.

    Args:
        results: Results of `moelpr evaluate` (text or harness) as JSON; they become the card's model-index, and their
            languages the model's.
        evaluated: Name of the model in the results; None for the one that was read from `folder`.
        languages: Codes of further languages; so are `tags`.

    Returns:
        The new metadata.

    Raises:
        UserError: `folder` has no card, or results are of another kind or model; the card is then unchanged.
    """
    card = read_card(folder)
    if card is None:
        raise UserError(
            f"{folder} has no {CARD_FILE}; pass a folder that moelpr model export or moelpr model graft wrote"
        )
    if base_model and not is_hub_name(base_model):
        raise UserError(f"--base-model must be OWNER/NAME on the Hugging Face Hub, got {base_model}")
    if wrong := [code for code in languages or [] if not re.fullmatch(_LANGUAGE, code)]:
        raise UserError(
            f'--languages must be language codes such as el or pt-BR (or "multilingual" or "code"), got {wrong[0]}'
        )
    found = [result for path in results for result in _read_results(path, folder, evaluated)]
    measured = [result.dataset_config or "" for result in found]
    codes = [
        *map(canonical, languages or []),
        *(code for code in measured if re.fullmatch("[a-z]{2,3}(-[A-Z][a-z]{3})?", code)),
    ]
    data: Any = card.data
    data.base_model, data.license = base_model or data.base_model, license or data.license
    if codes:
        data.language = list(dict.fromkeys([*texts(data.language), *codes]))
    if tags:
        data.tags = list(dict.fromkeys([*texts(data.tags), *tags]))
    if found:
        data.model_name, data.eval_results = folder.resolve().name, found
    write_text(folder / CARD_FILE, card.content)
    return data


def _read_results(path: Path, folder: Path, evaluated: str | None) -> list[EvalResult]:
    """The results of every language and metric."""
    content = records.read(Evaluation, path, _REMEDY)
    models = content.models
    same = [name for name, model in models.items() if Path(model.directory).resolve() == folder.resolve()]
    name = evaluated or (same[0] if same else None)
    if name is None or name not in models:
        raise UserError(
            f"{path} has no results of {evaluated or folder}; name the model with --evaluated, one of "
            f"{', '.join(models)}"
        )
    if limit := content.settings.get("limit"):
        raise UserError(f"{path} has only the first {limit} questions of each task; run it again without --limit")
    if missing := models[name].scores.keys() - content.benchmarks.keys():
        raise UserError(f"{path} does not say how {min(missing)} was run; {_REMEDY}")
    return list(content.results(name))
