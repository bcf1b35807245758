"""Results of routing: statistics per layer and language, and the layers that break the language prior."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from moelpr.base.errors import UserError
from moelpr.base.languages import language_name
from moelpr.measure.evaluate.compare import Comparison
from moelpr.measure.evaluate.results import Results, evaluation_file
from moelpr.measure.evaluate.routing import Routing, broken_priors
from moelpr.measure.report import page
from moelpr.measure.report.evaluation_files import BrokenPrior, EvaluationFile, LanguageResult, ModelResult
from moelpr.measure.report.plots import Panel, heat_maps

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
    "new_gate_weight": (
        "Mean gate weight of new experts",
        "How much of a token's output comes from new experts, whatever it chose first: 0 is the base's output.",
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

    def __init__(self, comparison: Comparison, data: Mapping[str, str], original: Sequence[str], threshold: float):
        """Collect the routing of all MoE models, of which there must be one; `original` is empty if it is unknown."""
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
        """The layers that break the language prior; none if the original languages are unknown."""
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
        names: dict[str, str] = {}  # part of a file's name -> model
        for model in self._routing:
            name = "".join(character if character.isalnum() or character in "._-" else "_" for character in model)
            while name in names:
                name += "_"
            names[name] = model
        return [figure for name, model in names.items() for figure in self._figures_of(model, name)]

    def _figures_of(self, model: str, file_name: str) -> list[page.Figure]:
        statistics = self._routing[model]
        layers = next(iter(statistics.values())).layers
        rows = [str(layer) for layer in layers]
        languages = sorted(statistics, key=lambda language: language not in self._original)
        num_original = sum(language in self._original for language in languages)
        groups = {"original": num_original, "expanded": len(languages) - num_original}
        figures = []
        for name, (title, note) in LAYER_NUMBERS.items():
            values = {language: getattr(statistics[language], name) for language in languages}
            broken = self.broken(model) if name == "original_first_share" else []
            wrong = [(prior.language, layers.index(prior.layer)) for prior in broken]
            column_groups = groups if 0 < num_original < len(languages) else {}
            panel = Panel(model, values, rows, outlined=wrong, column_groups=column_groups)
            darkest = 1.0 if name.endswith(("share", "weight")) else max(map(max, values.values()))
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

    def numbers(self) -> EvaluationFile:
        models = {
            model: ModelResult(
                str(self._comparison.models[model]),
                {
                    language: LanguageResult(**vars(routing) | {name: getattr(routing, name) for name in LAYER_NUMBERS})
                    for language, routing in statistics.items()
                },
                broken_priors=self.broken(model),
            )
            for model, statistics in self._routing.items()
        }
        return evaluation_file(models, self._comparison, self._data, self._original, {"threshold": self._threshold})
