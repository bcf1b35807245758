"""The results of an evaluation: numbers with intervals, as JSON, as a page and on the terminal.

Intervals are percentile bootstrap intervals over documents (Efron and Tibshirani, 1993, chapter 13). A language's
documents are sampled with replacement, as many as there are, and the number is computed from the sample; the middle 95%
of 1,000 such numbers are its interval. All models get the same samples, and a change between two models is computed
sample by sample: what makes a document hard for both cancels out. Languages with equally many documents get the same
samples too: in parallel text, documents with the same number are translations of each other, alike in difficulty, and
independent samples would make the interval of a mean over languages too narrow.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moelpr.errors import UserError
from moelpr.evaluate.compare import Comparison
from moelpr.evaluate.routing import BrokenPrior, Routing, broken_priors
from moelpr.evaluate.scoring import LanguageScore, metrics
from moelpr.files import atomic_file
from moelpr.languages import language_name
from moelpr.report import page
from moelpr.report.plots import Interval, Panel, change_chart, heat_maps, percent

NUM_SAMPLES = 1000
METRICS = ("bits_per_byte", "perplexity", "accuracy", "bytes_per_token")
# Of models with different tokenizers, these can be compared.
ANY_TOKENIZER = ("bits_per_byte", "bytes_per_token")
MEANS = {"mean original": "Original languages", "mean expanded": "Expanded languages"}
# [1 + NUM_SAMPLES]: a number, then what it is in each bootstrap sample of the documents.
Estimate = NDArray[np.float64]


def estimates(
    scores: Mapping[str, LanguageScore], seed: int, documents: Sequence[str] = (), population: Sequence[str] = ()
) -> dict[str, dict[str, Estimate]]:
    """METRICS on one text from the same samples for all models: model -> metric -> estimate.

    Args:
        scores: model -> its score on the text.
        seed: of the samples.
        documents: a name per document, of texts that share some documents. By default their numbers.
        population: all names in these texts, from which the samples are drawn. A name's documents are drawn together.
    """
    columns = np.array([column for score in scores.values() for column in score.columns], dtype=np.float64).T
    places = {name: place for place, name in enumerate(population)}
    rows = [places[name] for name in documents] or range(len(columns))
    size = len(population) or len(columns)
    rng = np.random.default_rng([seed, size])
    sums = np.full((NUM_SAMPLES, columns.shape[1]), np.nan)
    for number in range(NUM_SAMPLES if len(columns) > 1 else 0):
        times = np.bincount(rng.integers(size, size=size), minlength=size)
        sums[number] = times[rows] @ columns
    result = {}
    for index, (model, score) in enumerate(scores.items()):
        samples = metrics(*sums[:, 4 * index : 4 * index + 4].T)
        result[model] = {metric: np.append(value, samples[metric]) for metric, value in score.metrics.items()}
    return result


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over languages, sample by sample."""
    numbers = np.mean(estimates, axis=0)
    numbers[0] = sum(float(estimate[0]) for estimate in estimates) / len(estimates)  # more exact
    return numbers


def interval_of(estimate: Estimate) -> Interval:
    """The number and its 95% confidence interval, whose bounds are NaN for a language with a single document."""
    return Interval(float(estimate[0]), *map(float, np.percentile(estimate[1:], [2.5, 97.5])))


def is_clear(change: Interval) -> bool:
    """Whether its interval does not contain 0."""
    return change.has_bounds and change.is_clear


class Results(ABC):
    """What a command has measured: printed to the terminal and written to a folder."""

    name: str  # of the files
    title: str

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All numbers."""

    @abstractmethod
    def findings(self) -> list[str]:
        """What the numbers show, one sentence each."""

    @abstractmethod
    def tables(self) -> dict[str, page.Table]:
        """Title -> table."""

    def figures(self) -> list[page.Figure]:
        return []

    def samples(self) -> list[page.Block]:
        """Text written by the models."""
        return []

    def print(self) -> None:
        """Print tables and findings to stdout."""
        for title, table in self.tables().items():
            print("\n\n".join(part for part in (title, page.terminal_table(table), table.note) if part) + "\n")
        print("\n".join(self.findings()))

    def write(self, folder: Path) -> None:
        """Write NAME.json, NAME.md, NAME.html and each figure as SVG into `folder`, replacing existing files."""
        with atomic_file(folder / f"{self.name}.json") as temporary:
            content = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(content + "\n", encoding="utf-8")
        findings: list[page.Block] = [page.Points(self.findings())] if self.findings() else []
        tables = [page.Section(title, [table]) for title, table in self.tables().items()]
        overview = page.Section("", [*findings, *self.figures()])
        continuations = page.Section("Continuations", self.samples())
        page.write_page(folder, self.name, page.Page(self.title, sections=[overview, *tables, continuations]))


class TextResults(Results):
    """Estimates for every model on every language, then for the means of original and expanded languages.

    A change is relative to the first model; that of accuracy is the difference. Changes of perplexity and accuracy
    exist only for models with the first model's tokens.
    """

    name, title = "results", "Held-out text"

    def __init__(self, comparison: Comparison, data: Mapping[str, Path], original: Sequence[str], seed: int):
        """`data`: language -> file. `original`: the original languages; empty if they were not named."""
        self._comparison, self._data, self._original, self._seed = comparison, data, original, seed
        self._first, *others = models = list(comparison.models)
        found = {language: estimates(comparison.scores_on(language), seed) for language in data}
        for group in MEANS if original else ():
            members = [found[code] for code in data if (code in original) == (group == "mean original")]
            if members:
                found[group] = {m: {name: mean([by[m][name] for by in members]) for name in METRICS} for m in models}
        tokens = {m: [score.document_tokens for score in scores.values()] for m, scores in comparison.scores.items()}
        self._has_same_tokens = {model: tokens[model] == tokens[self._first] for model in models}
        # language or mean -> model -> metric -> interval
        self._rows = {
            row: {m: {name: interval_of(estimate) for name, estimate in of.items()} for m, of in by.items()}
            for row, by in found.items()
        }
        self._changes = {row: {m: self._change(by[m], by[self._first], m) for m in others} for row, by in found.items()}
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
                if not is_clear(change):
                    verdict = f"no clear change from {self._first} to {model}"
                number = _with_interval(change, percent)
                findings.append(f"{MEANS.get(row, language_name(row))}: {verdict} ({number} bits per byte).")
        findings += [
            f"{warning}."
            for language in self._data
            for model, score in self._comparison.scores_on(language).items()
            if (warning := score.warning(model, language_name(language)))
        ]
        return findings + self._unequal_contexts()

    def _unequal_contexts(self) -> list[str]:
        """With different tokenizers, windows of equally many tokens are more text, and so more context, for one."""
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
            row: {m: _with_interval(c, percent) + ("" if is_clear(c) else " unclear") for m, c in by_model.items()}
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
        return {title: table for title, table in tables.items() if len(table.head) > 1}

    def _cells(self, metric: str, form: str) -> dict[str, dict[str, str]]:
        return {
            row: {model: _with_interval(estimates[metric], form.format) for model, estimates in by_model.items()}
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
        samples = [
            page.Sample(
                code, language_name(code), text["prompt"], text["by_model"] | {"the text itself": text["reference"]}
            )
            for code, text in self._comparison.continuations.items()
        ]
        note = "The first words of a held-out document, continued by each model. One sample does not show quality."
        return [page.Text(note, "note"), *samples] if samples else []

    def to_json(self) -> dict[str, Any]:
        settings = {"seed": self._seed, "continuation_tokens": self._comparison.continuation_tokens}
        return {
            **_settings_json(self._comparison, self._data, self._original, settings),
            "models": {
                model: {
                    "directory": str(directory),
                    "languages": {language: self._language_json(model, language) for language in self._data},
                    "means": {row: self._row_json(model, row) for row in self._rows if row not in self._data},
                }
                for model, directory in self._comparison.models.items()
            },
            "continuations": self._comparison.continuations,
        }

    def _language_json(self, model: str, language: str) -> dict[str, Any]:
        score = self._comparison.scores[model][language]
        return self._row_json(model, language) | {
            "documents": len(score.document_bits),
            "tokens": sum(score.document_tokens),
            "bytes": sum(score.document_bytes),
            "unknown_tokens": score.unknown_tokens,
            "original_expert_share": score.routing and score.routing.original_expert_share,
            "all_original_share": score.routing and score.routing.all_original_share,
        }

    def _row_json(self, model: str, row: str) -> dict[str, Any]:
        changes = self._changes[row].get(model, {})
        change = {metric: _interval_json(change) | {"is_clear": is_clear(change)} for metric, change in changes.items()}
        return {metric: _interval_json(found) for metric, found in self._rows[row][model].items()} | {"change": change}


# Table and map of a number per layer and language: name -> title, note.
LAYER_NUMBERS = {
    "original_first_share": (
        "Fraction of first choices that are an original expert",
        "Tokens of original languages should choose original experts, those of expanded languages new ones.",
    ),
    "original_chosen_share": (
        "Fraction of tokens with an original expert among their top K",
        "1: the original experts still process every token.",
    ),
    "all_original_share": (
        "Fraction of tokens whose top K are all original experts",
        "In these layers they get exactly what the base would compute.",
    ),
    "load_imbalance": (
        "Load imbalance: busiest expert divided by the mean",
        "1 is even. On original languages a high value is intended: it is the language prior.",
    ),
    "entropy": (
        "Entropy of a token's router scores, in nats",
        "0: certain of one expert. ln of the number of experts: undecided.",
    ),
}


class RoutingResults(Results):
    """Statistics of every MoE model on every language, and which layers break the language prior."""

    name, title = "routing", "Routing"

    def __init__(self, comparison: Comparison, data: Mapping[str, Path], original: Sequence[str], threshold: float):
        """`data`: language -> file. `threshold`: see `broken_priors`. Raises UserError if all models are dense."""
        self._comparison, self._data, self._original, self._threshold = comparison, data, original, threshold
        by_model = {
            model: {language: score.routing for language, score in scores.items() if score.routing is not None}
            for model, scores in comparison.scores.items()
        }
        self._routing = {model: statistics for model, statistics in by_model.items() if statistics}
        if not self._routing:
            raise UserError(
                f"--model {', '.join(by_model)} have no routing: all layers are dense, or every text is a single "
                "token; pass an MoE model and longer texts"
            )

    def broken(self, model: str) -> list[BrokenPrior]:
        """Empty if the original languages are unknown."""
        return broken_priors(self._routing[model], self._original, self._threshold) if self._original else []

    def findings(self) -> list[str]:
        if not self._original:
            return ["Pass --original-languages to list the layers that break the language prior."]
        findings = []
        for model in self._routing:
            broken = self.broken(model)
            for (language, is_original), priors in groupby(broken, lambda prior: (prior.language, prior.is_original)):
                layers = [f"{prior.layer} ({prior.share:.0%})" for prior in priors]
                wrong = f"{'a new' if is_original else 'an original'} expert first in layer{'s' if layers[1:] else ''}"
                findings.append(f"{model}: {language_name(language)} tokens choose {wrong} {', '.join(layers)}.")
            if not broken:
                findings.append(f"{model}: no layer breaks the language prior (threshold {self._threshold:.0%}).")
        return findings

    def tables(self) -> dict[str, page.Table]:
        return {
            f"{title}: {model}": self._table(name, statistics, note)
            for name, (title, note) in LAYER_NUMBERS.items()
            for model, statistics in self._routing.items()
        }

    def _table(self, name: str, statistics: Mapping[str, Routing], note: str) -> page.Table:
        columns = [getattr(routing, name) for routing in statistics.values()]
        layers = next(iter(statistics.values())).layers
        rows = [page.Row([str(layer), *(f"{column[i]:.3f}" for column in columns)]) for i, layer in enumerate(layers)]
        rows.append(page.Row(["mean", *(f"{sum(column) / len(column):.3f}" for column in columns)], "mean"))
        return page.Table(["layer", *statistics], rows, note)

    def figures(self) -> list[page.Figure]:
        return [figure for model in self._routing for figure in self._figures_of(model)]

    def _figures_of(self, model: str) -> list[page.Figure]:
        statistics = self._routing[model]
        layers = next(iter(statistics.values())).layers
        rows = [str(layer) for layer in layers]
        languages = sorted(statistics, key=lambda language: language not in self._original)
        num_original = sum(language in self._original for language in languages)
        groups = {"original": num_original, "expanded": len(languages) - num_original}
        file_name = "".join(character if character.isalnum() or character in "._-" else "_" for character in model)
        figures = []
        for name, (title, note) in LAYER_NUMBERS.items():
            values = {language: getattr(statistics[language], name) for language in languages}
            broken = self.broken(model) if name == "original_first_share" else []
            panel = Panel(
                model, values, rows,
                outlined=[(prior.language, layers.index(prior.layer)) for prior in broken],
                column_groups=groups if 0 < num_original < len(languages) else {},
            )  # fmt: skip
            darkest = 1.0 if name.endswith("share") else max(map(max, values.values()))
            svg = heat_maps(f"{title}: {model}", [panel], form="{:.2f}", darkest=darkest, corner="layer")
            outlined = " Outlined: more than the allowed fraction makes the wrong choice." if broken else ""
            caption = f"{model}: {title}. {note}{outlined}"
            figures.append(page.Figure([svg], caption, name=f"routing-{file_name}-{name.replace('_', '-')}"))
        experts = []
        for language, routing in statistics.items():
            by_layer = routing.first_choice_share
            columns = {str(expert): [shares[expert] for shares in by_layer] for expert in range(len(by_layer[0]))}
            experts.append(Panel(language_name(language), columns, rows, split_after=routing.num_original_places))
        title = "Fraction of first choices per layer (rows), expert (columns) and language"
        svg = heat_maps(f"{title}: {model}", experts, form="{:.2f}", corner="layer", cell_width=30)
        return [*figures, page.Figure([svg], f"{model}: {title}.", name=f"routing-{file_name}-experts")]

    def to_json(self) -> dict[str, Any]:
        return {
            **_settings_json(self._comparison, self._data, self._original, {"threshold": self._threshold}),
            "models": {
                model: {
                    "directory": str(self._comparison.models[model]),
                    "languages": {
                        language: asdict(routing) | {name: getattr(routing, name) for name in LAYER_NUMBERS}
                        for language, routing in statistics.items()
                    },
                    "broken_priors": [asdict(prior) for prior in self.broken(model)],
                }
                for model, statistics in self._routing.items()
            },
        }


def _settings_json(
    comparison: Comparison, data: Mapping[str, Path], original: Sequence[str], settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "settings": {**asdict(comparison.settings), **settings},
        "data": {language: str(path) for language, path in data.items()},
        "original_languages": list(original),
    }


def _interval_json(interval: Interval) -> dict[str, float | None]:
    return {name: None if np.isnan(number) else number for name, number in interval._asdict().items()}


def _with_interval(interval: Interval, write: Callable[[float], str]) -> str:
    value, low, high = map(write, interval)
    return f"{value} [{low}, {high}]" if interval.has_bounds else value
