"""What an evaluation on text says: numbers with their intervals, changes against the first model, and sentences."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from moelpr.evaluate.arguments import TextJob
from moelpr.evaluate.bootstrap import METRICS, Estimate, estimates, mean
from moelpr.evaluate.change_picture import change_picture
from moelpr.evaluate.compare import group_means
from moelpr.evaluate.measure import Measured
from moelpr.evaluate.tables import Table
from moelpr.languages import language_name
from moelpr.report.svg import Drawing


class TextResults:
    """Estimates of every model on every language; rows are languages, then means of the two groups."""

    def __init__(self, job: TextJob, measured: Measured, seed: int):
        self._job, self._measured, self._seed = job, measured, seed
        self._models = list(job.models)
        # language or mean -> model -> metric -> estimate
        self._rows = {language: estimates(measured.scores(language), seed, language) for language in job.files}
        groups = group_means(dict.fromkeys(job.files, 0.0), job.original) if job.original else {}
        for group in groups:
            members = [name for name in job.files if (name in job.original) == (group == "mean original")]
            self._rows[group] = {
                model: {metric: mean([self._rows[name][model][metric] for name in members]) for metric in METRICS}
                for model in self._models
            }

    def change(self, row: str, model: str, metric: str) -> Estimate | None:
        """Against the first model: relative, for accuracy the difference.

        None for the first model itself, and where tokens are not the same ones, so that numbers per token say nothing.
        """
        reference = self._models[0]
        if model == reference or (metric != "bits_per_byte" and not self._has_same_tokens(model)):
            return None
        ours, theirs = self._rows[row][model][metric], self._rows[row][reference][metric]
        return ours.minus(theirs) if metric == "accuracy" else ours.relative_to(theirs)

    def _has_same_tokens(self, model: str) -> bool:
        ours, theirs = (self._measured.results[name].scores for name in (model, self._models[0]))
        return all(score.document_tokens == theirs[language].document_tokens for language, score in ours.items())

    def findings(self) -> list[str]:
        """A sentence for each model and group of languages, and one for each language a tokenizer cannot write."""
        sentences = []
        for row in self._rows:
            for model in self._models[1:]:
                change = self.change(row, model, "bits_per_byte")
                assert change is not None
                sentences.append(f"{_row_name(row)}: {_verdict(model, self._models[0], change)}.")
        return sentences + [
            f"{model} cannot write {score.unknown_share:.1%} of the {language_name(language)} tokens (unknown tokens); "
            "its numbers there say little."
            for language in self._job.files
            for model, score in self._measured.scores(language).items()
            if score.unknown_tokens
        ]

    def tables(self) -> list[Table]:
        per_token = (
            "Per token: comparable between models of the same tokenizer only."
            if all(self._has_same_tokens(model) for model in self._models)
            else "Per token, and these models' tokenizers differ: compare their bits per byte, not these."
        )
        tables = [self._table("Bits per byte (fewer is better)", "bits_per_byte", "{:.3f}".format, _BRACKETS)]
        if len(self._models) > 1:
            tables.append(self._change_table())
        return [
            *tables,
            self._table("Next-token accuracy (more is better)", "accuracy", "{:.2%}".format, per_token),
            self._table("Perplexity per token (fewer is better)", "perplexity", "{:.4g}".format, per_token),
        ]

    def _table(self, title: str, metric: str, write: Callable[[float], str], note: str) -> Table:
        rows = [
            [row, *(_with_interval(models[model][metric], write) for model in self._models)]
            for row, models in self._rows.items()
            if metric != "perplexity" or row in self._job.files  # a mean of perplexities is nobody's
        ]
        return Table(title, ["language", *self._models], rows, note)

    def _change_table(self) -> Table:
        rows = []
        for row in self._rows:
            changes = [self.change(row, model, "bits_per_byte") for model in self._models[1:]]
            rows.append([row, *(_written_change(change) for change in changes if change is not None)])
        return Table(
            f"Bits per byte against {self._models[0]}",
            ["language", *self._models[1:]],
            rows,
            "A change is unclear where its interval holds 0: other documents could show the opposite.",
        )

    def pictures(self) -> dict[str, tuple[Drawing, str]]:
        if len(self._models) == 1:
            return {}
        changes = {
            row: {model: self.change(row, model, "bits_per_byte") for model in self._models[1:]} for row in self._rows
        }
        return {
            "change": (
                change_picture(changes, self._models[0]),
                f"Change in bits per byte against {self._models[0]}, with 95 % intervals; left is better, "
                "a hollow mark is unclear.",
            )
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": {**asdict(self._measured.settings), "seed": self._seed},
            "data": {language: str(path) for language, path in self._job.files.items()},
            "original_languages": self._job.original,
            "models": {
                model: {
                    "directory": str(directory),
                    "languages": {language: self._language_json(model, language) for language in self._job.files},
                    "means": {
                        row: self._estimates_json(model, row) for row in self._rows if row not in self._job.files
                    },
                }
                for model, directory in self._job.models.items()
            },
        }

    def _language_json(self, model: str, language: str) -> dict[str, Any]:
        score = self._measured.results[model].scores[language]
        return {
            **self._estimates_json(model, language),
            "documents": len(score.document_bits),
            "tokens": sum(score.document_tokens),
            "bytes": sum(score.document_bytes),
            "unknown_tokens": score.unknown_tokens,
            "original_expert_share": score.routing and score.routing.original_expert_share,
        }

    def _estimates_json(self, model: str, row: str) -> dict[str, Any]:
        content: dict[str, Any] = {metric: self._rows[row][model][metric].to_json() for metric in METRICS}
        changes = {metric: self.change(row, model, metric) for metric in METRICS}
        content["change"] = {
            metric: {**change.to_json(), "is_clear": change.is_clear}
            for metric, change in changes.items()
            if change is not None
        }
        return content


_BRACKETS = "In brackets: 95 % intervals, bootstrap over documents."


def _with_interval(estimate: Estimate, write: Callable[[float], str]) -> str:
    low, high = estimate.interval
    return write(estimate.value) if low != low else f"{write(estimate.value)} [{write(low)}, {write(high)}]"


def _written_change(change: Estimate) -> str:
    text = _with_interval(change, "{:+.1%}".format).replace("-", "\u2212")
    return text if change.is_clear else f"{text} unclear"


def _verdict(model: str, reference: str, change: Estimate) -> str:
    found = f"{_with_interval(change, '{:+.1%}'.format)} bits per byte".replace("-", "\u2212")
    if not change.is_clear:
        return f"no clear change from {reference} to {model} ({found})"
    return f"{model} is {'better' if change.value < 0 else 'worse'} than {reference} ({found})"


def _row_name(row: str) -> str:
    return {"mean original": "Original languages", "mean expanded": "Expanded languages"}.get(row, language_name(row))
