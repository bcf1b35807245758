"""The search for learning rates: short runs, evaluated on a validation part of the text."""

from pathlib import Path
from statistics import fmean

from examples.languages import EXPANDED
from examples.real_model.settings import BASE, RATES
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.result_cache import cached_results


def search_name(setting: str, rate: float) -> str:
    return f"search-{setting}-{rate:g}"


def searches(setting: str) -> tuple[str, ...]:
    """The tasks that find a setting's rate."""
    return tuple(f"evaluate-{search_name(setting, rate)}" for rate in RATES[setting])


def best_rate(run: Path, setting: str) -> float:
    """The rate with the lowest bits per byte; one that diverged is never the best.

    Raises:
        UserError: No run of the search has been evaluated.
    """
    changes = searched_changes(run, setting)
    if not changes:
        marks = run / "logs" / f"evaluate-search-{setting}-*.json"
        raise UserError(
            f"{run}/validation has no results of the search of {setting}; remove {marks} and rerun make results"
        )
    return min(changes, key=lambda rate: changes[rate] if changes[rate] == changes[rate] else float("inf"))


def searched_changes(run: Path, setting: str) -> dict[float, float]:
    """Learning rate -> mean change of the expanded languages against base on the validation part, of those measured."""
    changes = {}
    for rate in RATES.get(setting, ()):
        bits = [bits_per_byte(run / "validation", model) for model in (BASE, search_name(setting, rate))]
        if all(found.keys() >= {*EXPANDED} for found in bits):  # an evaluation may be in progress
            changes[rate] = fmean(bits[1][language] / bits[0][language] - 1 for language in EXPANDED)
    return changes


def bits_per_byte(folder: Path, model: str) -> dict[str, float]:
    """Text -> bits per byte of a model; {} if it has not been evaluated."""
    scores = {text: score for text, score in cached_results(folder, model).items() if "document_bits" in score}
    return {text: sum(score["document_bits"]) / sum(score["document_bytes"]) for text, score in scores.items()}
