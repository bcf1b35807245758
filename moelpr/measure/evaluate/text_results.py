"""Results on held-out text: each metric and its changes, with intervals, per language and model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelpr.base.languages import language_name
from moelpr.data.text.language_id import Detector, FastTextModel
from moelpr.measure.evaluate.compare import Comparison
from moelpr.measure.evaluate.confidence import Estimate, estimates, interval_of, mean
from moelpr.measure.evaluate.results import Results, evaluation_file
from moelpr.measure.evaluate.wrong_language import wrong_language
from moelpr.measure.report import page
from moelpr.measure.report.evaluation_files import (
    EvaluationFile,
    LanguageResult,
    ModelResult,
    continuation_samples,
    wrong_language_table,
)
from moelpr.measure.report.numbers import Interval, percent
from moelpr.measure.report.plots import change_chart

METRICS = ("bits_per_byte", "perplexity", "accuracy", "bytes_per_token")
# Metrics that are comparable between models with different tokenizers.
ANY_TOKENIZER = ("bits_per_byte", "bytes_per_token")
_ROUTING = ("layers", "original_first_share", "all_original_share", "new_gate_weight")
MEANS = {"mean original": "Original languages", "mean expanded": "Expanded languages"}


class TextResults(Results):
    """Estimates for every model on every language, then for the means of original and expanded languages.

    A change is relative to the first model; that of accuracy is the difference. Changes of perplexity and accuracy
    exist only for models with the first model's tokens.
    """

    name, title = "results", "Held-out text"

    def __init__(
        self,
        comparison: Comparison,
        data: Mapping[str, str],
        original: Sequence[str],
        seed: int,
        identifier: Detector | FastTextModel | None = None,
    ):
        """Compute all estimates; `original` is empty if the original languages were not named."""
        self._wrong = wrong_language(identifier, comparison.continued) if identifier else {}
        self._comparison, self._data, self._original, self._seed = comparison, data, original, seed
        self._first, *others = models = list(comparison.models)
        by_model = {language: estimates(comparison.scores_on(language), seed) for language in data}
        for group in MEANS if original else ():
            if members := [by_model[code] for code in data if (code in original) == (group == "mean original")]:
                by_model[group] = {m: {x: mean([by[m][x] for by in members]) for x in members[0][m]} for m in models}
        tokens = {m: [score.document_tokens for score in scores.values()] for m, scores in comparison.scores.items()}
        self._has_same_tokens = {model: tokens[model] == tokens[self._first] for model in models}
        # language or mean -> model -> metric -> interval
        self._rows = {
            row: {m: {name: interval_of(estimate) for name, estimate in of.items()} for m, of in by.items()}
            for row, by in by_model.items()
        }
        self._changes = {
            row: {m: self._change(by[m], by[self._first], m) for m in others} for row, by in by_model.items()
        }
        self._bits_changes = {
            row: {m: change["bits_per_byte"] for m, change in by.items()} for row, by in self._changes.items()
        }

    def _change(self, ours: dict[str, Estimate], theirs: dict[str, Estimate], model: str) -> dict[str, Interval]:
        names = METRICS if self._has_same_tokens[model] else ANY_TOKENIZER
        return {m: interval_of(ours[m] - theirs[m] if m == "accuracy" else ours[m] / theirs[m] - 1) for m in names}

    def findings(self) -> list[str]:
        findings = []
        for row, changes in self._bits_changes.items():
            for model, change in changes.items():
                verdict = f"{model} is {'better' if change.value < 0 else 'worse'} than {self._first}"
                if not change.is_clear:
                    verdict = f"no clear change from {self._first} to {model}"
                number = change.text(percent)
                findings.append(f"{MEANS.get(row, language_name(row))}: {verdict} ({number} bits per byte).")
        findings += [
            f"{warning}."
            for language in self._data
            for model, score in self._comparison.scores_on(language).items()
            if (warning := score.warning(model, language_name(language)))
        ]
        return findings + self._unequal_contexts()

    def _unequal_contexts(self) -> list[str]:
        """A warning: a window of as many tokens is more text, and so more context, for one of two tokenizers."""
        if all(self._has_same_tokens.values()):
            return []
        length = self._comparison.settings.sequence_length
        assert length is not None
        longest = [  # tokens of each document, with the tokenizer that needs the most
            max(tokens)
            for language in self._data
            for tokens in zip(*(s.document_tokens for s in self._comparison.scores_on(language).values()), strict=True)
        ]
        cut = sum(tokens > length for tokens in longest)
        if cut == 0:
            return []
        return [
            f"{cut:,} of {len(longest):,} documents are longer than a window of {length:,} tokens, in which a model "
            "with more bytes per token sees more text; for equal contexts, raise --sequence-length (the longest "
            f"document has {max(longest):,} tokens)."
        ]

    def tables(self) -> dict[str, page.Table]:
        intervals = (
            "Per byte of text: comparable between models with different tokenizers, unlike numbers per token. In "
            "brackets: 95% confidence intervals, bootstrap over documents."
        )
        tokenizers = "How the tokenizers split the text: twice the bytes per token is half the tokens to compute."
        unclear = "A change is unclear if its interval contains 0: with other documents it could be the opposite."
        per_token = (
            "Per token: comparable only between models with the same tokenizer."
            if all(self._has_same_tokens.values())
            else "Per token, and these models' tokenizers differ: compare their bits per byte instead."
        )
        changes = {
            row: {m: c.text(percent) + ("" if c.is_clear else " unclear") for m, c in by_model.items()}
            for row, by_model in self._bits_changes.items()
        }
        # Averaging perplexities is meaningless.
        perplexity = {row: cells for row, cells in self._cells("perplexity", "{:.4g}").items() if row in self._data}
        tables = {
            "Bits per byte (lower is better)": self._table(self._cells("bits_per_byte", "{:.3f}"), intervals),
            "Bytes per token (higher is better)": self._table(self._cells("bytes_per_token", "{:.2f}"), tokenizers),
            f"Bits per byte against {self._first}": self._table(changes, unclear),
            "Next-token accuracy (higher is better)": self._table(self._cells("accuracy", "{:.2%}"), per_token),
            "Perplexity per token (lower is better)": self._table(perplexity, per_token),
        }
        if any("distance" in estimates for by_model in self._rows.values() for estimates in by_model.values()):
            title = "Distance from the base: KL(base‖model), nats per token"
            tables[title] = self._table(self._cells("distance", "{:.4f}"), "0: it predicts what the base does.")
        if self._wrong:
            tables["Continued in another language"] = wrong_language_table(self._wrong)
        return {title: table for title, table in tables.items() if len(table.head) > 1}

    def _cells(self, metric: str, form: str) -> dict[str, dict[str, str]]:
        return {
            row: {
                model: estimates[metric].text(form.format)
                for model, estimates in by_model.items()
                if metric in estimates
            }
            for row, by_model in self._rows.items()
        }

    def _table(self, cells: Mapping[str, Mapping[str, str]], note: str) -> page.Table:
        rows = [
            page.Row([row, *by_model.values()], "" if row in self._data else "mean") for row, by_model in cells.items()
        ]
        return page.Table(["language", *next(iter(cells.values()))], rows, note)

    def figures(self) -> list[page.Figure]:
        if len(self._comparison.models) == 1:
            return []
        changes = {
            row if row in MEANS else language_name(row): by_model for row, by_model in self._bits_changes.items()
        }
        svg = change_chart("Change in bits per byte", changes, axis=f"bits per byte against {self._first}")
        caption = f"Change in bits per byte against {self._first}, with 95% confidence intervals; hollow: unclear."
        return [page.Figure([svg], caption, name="change")]

    def samples(self) -> list[page.Block]:
        return continuation_samples(self._comparison.continuations, {}, "One sample does not show quality.")

    def numbers(self) -> EvaluationFile:
        of = self._comparison
        settings: dict[str, Any] = {"seed": self._seed, "continuation_tokens": of.continuation_tokens}
        settings |= {"base": of.base} if of.base else {}
        models = {
            model: ModelResult(
                str(directory),
                {language: self._language_result(model, language) for language in self._data},
                {row: LanguageResult(**self._row(model, row)) for row in self._rows if row not in self._data},
            )
            for model, directory in of.models.items()
        }
        file = evaluation_file(models, of, self._data, self._original, settings)
        return replace(file, continuations=of.continuations, wrong_language=self._wrong)

    def _language_result(self, model: str, language: str) -> LanguageResult:
        score = self._comparison.scores[model][language]
        routing = score.routing
        return LanguageResult(
            **self._row(model, language),
            documents=len(score.document_bits),
            tokens=sum(score.document_tokens),
            bytes=sum(score.document_bytes),
            unknown_tokens=score.unknown_tokens,
            **({name: getattr(routing, name) for name in _ROUTING} if routing else {}),
        )

    def _row(self, model: str, row: str) -> dict[str, Any]:
        return {**self._rows[row][model], "change": self._changes[row].get(model, {})}
