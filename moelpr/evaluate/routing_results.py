"""What the routers do, in words, tables and maps, and which layers break the language prior."""

from dataclasses import asdict
from itertools import groupby
from typing import Any

from moelpr.errors import UserError
from moelpr.evaluate.arguments import TextJob
from moelpr.evaluate.measure import Measured
from moelpr.evaluate.routing import BrokenPrior, Routing, broken_priors
from moelpr.evaluate.routing_maps import expert_maps, language_map
from moelpr.evaluate.tables import Table
from moelpr.languages import language_name
from moelpr.report.svg import Drawing

# Table and map of a number per layer and language: name -> title, caption.
LAYER_NUMBERS = {
    "original_first_share": (
        "Share of first choices that are an original expert",
        "Original languages belong to the original experts, expanded ones to the new.",
    ),
    "original_chosen_share": (
        "Share of tokens with an original expert among their top K",
        "Where it is 1, the original experts still work for every token.",
    ),
    "load_imbalance": (
        "Load imbalance: busiest expert divided by the mean",
        "1 is even. On original languages a high one is meant: it is the prior.",
    ),
    "entropy": (
        "Entropy of a token's router scores, in nats",
        "0: sure of one expert. ln of the number of experts: undecided.",
    ),
}


class RoutingResults:
    """Statistics of every MoE model on every language. Raises UserError where all models are dense."""

    def __init__(self, job: TextJob, measured: Measured, threshold: float):
        self._job, self._measured, self._threshold = job, measured, threshold
        self._routing: dict[str, dict[str, Routing]] = {}  # model -> language -> statistics
        for model, result in measured.results.items():
            found = {language: score.routing for language, score in result.scores.items() if score.routing is not None}
            if found:
                self._routing[model] = found
        if not self._routing:
            raise UserError(
                f"{', '.join(measured.results)} have no routing to map: their layers are all dense, or the texts are a "
                "single token each; give an MoE model and longer texts"
            )

    def broken(self, model: str) -> list[BrokenPrior]:
        """Empty where no original languages were named: then no prior is known."""
        if not self._job.original:
            return []
        return broken_priors(self._routing[model], self._job.original, self._threshold)

    def findings(self) -> list[str]:
        if not self._job.original:
            return ["Name the --original-languages to learn which layers break the language prior."]
        sentences = []
        for model in self._routing:
            broken = self.broken(model)
            for language, group in groupby(broken, lambda prior: prior.language):
                sentences.append(f"{model}: {_sentence(language, list(group))}.")
            if not broken:
                sentences.append(f"{model}: no layer breaks the prior (threshold {self._threshold:.0%}).")
        return sentences

    def tables(self) -> list[Table]:
        return [
            self._table(f"{title}: {model}", name, model, note)
            for name, (title, note) in LAYER_NUMBERS.items()
            for model in self._routing
        ]

    def _table(self, title: str, name: str, model: str, note: str) -> Table:
        statistics = self._routing[model]
        columns = [getattr(routing, name) for routing in statistics.values()]
        layers = next(iter(statistics.values())).layers
        rows = [[f"{layer}", *(f"{column[index]:.3f}" for column in columns)] for index, layer in enumerate(layers)]
        rows.append(["mean", *(f"{sum(column) / len(column):.3f}" for column in columns)])
        return Table(title, ["layer", *statistics], rows, note)

    def pictures(self) -> dict[str, tuple[Drawing, str]]:
        pictures = {}
        for model, statistics in self._routing.items():
            broken = {(prior.language, prior.layer) for prior in self.broken(model)}
            outlined = " Outlined: more than the allowed share goes the wrong way." if broken else ""
            for name, (title, note) in LAYER_NUMBERS.items():
                is_prior = name == "original_first_share"
                drawing = language_map(
                    {language: getattr(routing, name) for language, routing in statistics.items()},
                    next(iter(statistics.values())).layers,
                    self._job.original,
                    outlined=broken if is_prior else set(),
                    largest=_largest(name, statistics),
                )
                pictures[f"routing-{_file_name(model)}-{name.replace('_', '-')}"] = (
                    drawing,
                    f"{model}: {title}. {note}{outlined if is_prior else ''}",
                )
            pictures[f"routing-{_file_name(model)}-experts"] = (
                expert_maps(statistics),
                f"{model}: share of first choices per layer (rows), expert (columns) and language.",
            )
        return pictures

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": {**asdict(self._measured.settings), "threshold": self._threshold},
            "data": {language: str(path) for language, path in self._job.files.items()},
            "original_languages": self._job.original,
            "models": {
                model: {
                    "directory": str(self._job.models[model]),
                    "languages": {language: _routing_json(routing) for language, routing in statistics.items()},
                    "broken_priors": [asdict(prior) for prior in self.broken(model)],
                }
                for model, statistics in self._routing.items()
            },
        }


def _routing_json(routing: Routing) -> dict[str, Any]:
    derived = {name: getattr(routing, name) for name in ("original_first_share", "load_imbalance")}
    return routing.to_json() | derived


def _largest(name: str, statistics: dict[str, Routing]) -> float:
    """The number that is drawn darkest."""
    if name.endswith("share"):
        return 1.0
    return max(max(getattr(routing, name)) for routing in statistics.values())


def _sentence(language: str, broken: list[BrokenPrior]) -> str:
    wrong = "a new expert" if broken[0].is_original else "an original expert"
    layers = ", ".join(f"{prior.layer} ({prior.share:.0%})" for prior in broken)
    return f"{language_name(language)} tokens choose {wrong} first in layer{'s' if broken[1:] else ''} {layers}"


def _file_name(model: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in model)
