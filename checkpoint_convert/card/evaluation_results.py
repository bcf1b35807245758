"""Adds evaluation results and metadata to a model card."""

import re
from pathlib import Path
from typing import Any

from checkpoint_convert.card.front_matter import read_card, split_card
from checkpoint_convert.hf.hub import is_hub_name
from checkpoint_convert.hf.model_files import CARD_FILE
from moelpr.languages import language_name
from moelpr.process.errors import UserError
from moelpr.store import yaml_files
from moelpr.store.files import parse_json, write_text

METRIC_NAMES = {
    "bits_per_byte": "Bits per byte (lower is better)",
    "perplexity": "Perplexity per token",
    "accuracy": "Next-token accuracy",
}

_LANGUAGE = r"code|multilingual|[a-z]{2,3}(-[A-Za-z0-9]+)*"


def update_card(
    folder: Path,
    results: list[Path],
    evaluated: str | None = None,
    base_model: str | None = None,
    languages: list[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
) -> dict[str, Any]:
    """Add metadata to the card of an export; the text below it stays as it is.

    Args:
        results: Results of `moelpr.evaluate` (text or harness) as JSON; they become the card's model-index, and their
            languages the model's.
        evaluated: Name of the model in the results; None for the one that was read from `folder`.
        base_model: owner/name on the Hub.
        languages: Codes of further languages.
        license: Identifier on the Hub.
        tags: Further tags.

    Returns:
        The new metadata.

    Raises:
        UserError: `folder` has no card, or results are of another kind or model; the card is then unchanged.
    """
    text = read_card(folder)
    if text is None:
        raise UserError(f"{folder} has no {CARD_FILE}; pass a folder that mcore_to_hf.py or graft.py wrote")
    if base_model and not is_hub_name(base_model):
        raise UserError(f"--base-model must be OWNER/NAME on the Hugging Face Hub, got {base_model}")
    metadata, body = split_card(text)
    if wrong := [code for code in languages or [] if not re.fullmatch(_LANGUAGE, code)]:
        raise UserError(
            f'--languages must be language codes such as el or pt-BR (or "multilingual" or "code"), got {wrong[0]}'
        )
    found = [result for path in results for result in _read_results(path, folder, evaluated)]
    measured = [result.dataset_config for result in found]
    codes = [*(languages or []), *(code for code in measured if re.fullmatch("[a-z]{2,3}", code))]
    metadata |= {key: value for key, value in (("base_model", base_model), ("license", license)) if value}
    for key, more in (("language", codes), ("tags", tags or [])):
        old = metadata.get(key) or []
        if more:
            before = old if isinstance(old, list) else [old]
            metadata[key] = list(dict.fromkeys([*(item for item in before if isinstance(item, str)), *more]))
    if found:
        from huggingface_hub.repocard_data import eval_results_to_model_index

        metadata["model-index"] = eval_results_to_model_index(folder.resolve().name, found)
    write_text(folder / CARD_FILE, f"---\n{yaml_files.dump(metadata)}---\n{body}")
    return metadata


def _read_results(path: Path, folder: Path, evaluated: str | None) -> list[Any]:
    """huggingface_hub's EvalResult of every language and metric."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        models = content["models"]
        same = [name for name, model in models.items() if Path(model["directory"]).resolve() == folder.resolve()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON of moelpr.evaluate"
        raise UserError(
            f"cannot read {path} ({reason}); pass results.json or harness.json of moelpr.evaluate --output, or what it "
            "printed with --json"
        ) from error
    name = evaluated or (same[0] if same else None)
    if name not in models:
        raise UserError(
            f"{path} has no results of {evaluated or folder}; name the model with --evaluated, one of "
            f"{', '.join(models)}"
        )
    try:
        return (
            [*_harness_results(content, models[name], path)]
            if "benchmarks" in content
            else [*_text_results(content, models[name])]
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} has no scores ({error!r}); pass the JSON of moelpr.evaluate or of moelpr.evaluate harness, which "
            "unlike that of routing has them"
        ) from error


def _text_results(content: dict[str, Any], model: dict[str, Any]) -> list[Any]:
    return [
        _result(
            language,
            f"held-out {language_name(language)} text, {model['languages'][language]['documents']:,} documents",
            Path(content["data"][language]).stem,
            metric,
            METRIC_NAMES[metric],
            model["languages"][language][metric]["value"],
        )
        for language in model["languages"]
        for metric in METRIC_NAMES
    ]


def _harness_results(content: dict[str, Any], model: dict[str, Any], path: Path) -> list[Any]:
    if limit := content["settings"]["limit"]:
        raise UserError(f"{path} has only the first {limit} questions of each task; run it again without --limit")
    results = []
    for benchmark, scores in model["scores"].items():
        metric, shots = content["benchmarks"][benchmark]["metric"], content["benchmarks"][benchmark]["num_fewshot"]
        for language, score in scores.items():
            name = f"{benchmark}, {language_name(language)}"
            results.append(
                _result(language, name, benchmark.lower(), metric, f"{metric}, {shots} shots", score["value"])
            )
    return results


def _result(language: str, name: str, kind: str, metric: str, metric_name: str, value: float) -> Any:
    from huggingface_hub import EvalResult

    if type(value) not in (int, float):
        raise TypeError(f"the {metric_name} of {language} must be a number, got {value!r}")
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=name,
        dataset_config=language,
        metric_type=metric,
        metric_name=metric_name,
        metric_value=value,
    )
