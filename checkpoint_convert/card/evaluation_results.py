"""Add evaluation results and metadata to a model card."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from checkpoint_convert.card.front_matter import read_card, texts
from checkpoint_convert.hf.model_files import CARD_FILE
from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.languages import canonical, language_name
from moelpr.measure.report.evaluation_files import EvaluationFile
from moelpr.measure.report.numbers import Interval, signed
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
    if (card := read_card(folder)) is None:
        raise UserError(
            f"{folder} has no {CARD_FILE}; pass a folder that moelpr model export or moelpr model graft wrote"
        )
    if base_model and not is_hub_name(base_model):
        raise UserError(f"--base-model must be OWNER/NAME on the Hugging Face Hub, got {base_model}")
    if wrong := [code for code in languages or [] if not re.fullmatch(_LANGUAGE, code)]:
        raise UserError(
            f'--languages must be language codes such as el or pt-BR (or "multilingual" or "code"), got {wrong[0]}'
        )
    scores = [result for path in results for result in _read_results(path, folder, evaluated)]
    measured = [result.dataset_config or "" for result in scores]
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
    if scores:
        data.model_name, data.eval_results = folder.resolve().name, scores
    write_text(folder / CARD_FILE, card.content)
    return data


def _read_results(path: Path, folder: Path, evaluated: str | None) -> list[EvalResult]:
    """The results of every language and metric."""
    content = records.read(EvaluationFile, path, _REMEDY)
    models = content.models
    folders = {name: Path(model.directory).resolve() for name, model in models.items() if model.directory}
    name = evaluated or next((name for name, directory in folders.items() if directory == folder.resolve()), None)
    if name is None or name not in models:
        raise UserError(
            f"{path} has no results of {evaluated or folder}; name the model with --evaluated, one of "
            f"{', '.join(models)}"
        )
    if limit := content.settings.get("limit"):
        raise UserError(f"{path} has only the first {limit} questions of each task; run it again without --limit")
    if missing := models[name].scores.keys() - content.benchmarks.keys():
        raise UserError(f"{path} does not say how {min(missing)} was run; {_REMEDY}")
    results = [*_on_text(content, name), *_on_benchmarks(content, name)]
    if bad := [result for result in results if not math.isfinite(result.metric_value)]:
        raise UserError(f"{path} has no {bad[0].metric_type} of {name} on {bad[0].dataset_name}; {_REMEDY}")
    return results


def _on_text(content: EvaluationFile, model: str) -> Iterator[EvalResult]:
    for language, measures in content.models[model].languages.items():
        name = f"held-out {language_name(language)} text, {measures.documents or 0:,} documents"
        kind = Path(content.data.get(language, language)).stem
        for metric, title in METRIC_NAMES.items():
            value = (getattr(measures, metric) or Interval(math.nan)).value
            yield EvalResult(_TASK, kind, name, metric, value, dataset_config=language, metric_name=title)


def _on_benchmarks(content: EvaluationFile, model: str) -> Iterator[EvalResult]:
    for benchmark, scores in content.models[model].scores.items():
        run = content.benchmarks[benchmark]
        for language, score in scores.items():
            parts = [f"{run.metric}, {run.num_fewshot} shots"]
            parts += [f"95% interval {score.low:.1f} to {score.high:.1f}"] if score.has_bounds else []
            parts += [f"against the base {score.change.text(signed)}"] if score.change else []
            dataset = benchmark.lower(), f"{benchmark}, {language_name(language)}"
            title = ", ".join(parts)
            yield EvalResult(_TASK, *dataset, run.metric, score.value, dataset_config=language, metric_name=title)
