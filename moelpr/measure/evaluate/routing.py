"""Routing statistics: what every router of a model decides during the model's own forward pass."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moelpr.measure.evaluate.models import LoadedModel
from moelpr.measure.report.evaluation_files import BrokenPrior
from moelpr.model.metrics.routing_sums import text_vector


@dataclass(frozen=True)
class Routing:
    """Routing of one language's text, averaged over its tokens. Lists run over MoE layers, then over experts."""

    layers: list[int]  # decoder layer numbers of the MoE layers, from 0
    tokens: int
    first_choice_share: list[list[float]]  # fraction of tokens whose highest router score is this expert's
    chosen_share: list[list[float]]  # fraction of tokens that choose this expert; sums to K per layer
    mean_score: list[list[float]]  # mean softmax score
    entropy: list[float]  # mean entropy of a token's router scores, in nats; at most ln E
    original_chosen_share: list[float]  # fraction of tokens with at least one original expert among their K
    all_original_share: list[float]  # fraction of tokens whose K choices are all original
    # Mean gate weight of a token's new experts, from 0 to 1; empty in results of earlier versions.
    new_gate_weight: list[float] = field(default_factory=list)
    num_original_places: int = field(default=1, kw_only=True)  # P

    @property
    def original_first_share(self) -> list[float]:
        """Fraction of first choices that are an original expert, per layer."""
        return [sum(shares[: self.num_original_places]) for shares in self.first_choice_share]

    @property
    def load_imbalance(self) -> list[float]:
        """Tokens of the busiest expert divided by the mean over experts, per layer; from 1 (even) to E / K."""
        return [max(shares) * len(shares) / sum(shares) for shares in self.chosen_share]


class RoutingObserver:
    """Accumulates what the routers of one model decide for the counted tokens of a language."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self._tokens = 0
        self._sums: dict[int, Tensor] = {}  # layer -> sum of its `text_vector`

    @contextmanager
    def observe(self, is_counted: Tensor) -> Iterator[None]:
        """Count the forward pass in the `with` block. `is_counted`: bool, shaped like the tokens [batch, sequence]."""
        weight_T = is_counted.flatten().float()
        self._tokens += int(is_counted.sum())
        with ExitStack() as hooks:
            for number, router in self._loaded.routers.items():
                hooks.callback(router.register_forward_hook(partial(self._add, number, weight_T)).remove)
            yield

    def _add(self, number: int, weight_T: Tensor, router: nn.Module, inputs: Any, output: Any) -> None:
        logits_TE = self._loaded.router_logits(router, inputs, output).float()
        vector = text_vector(logits_TE, self._loaded.topk, self._loaded.num_original_places, weight_T)
        self._sums[number] = self._sums.get(number, 0) + vector

    def result(self) -> Routing | None:
        """The means over all counted tokens; None for a dense model, or if no token was counted."""
        if not self._sums or self._tokens == 0:
            return None
        layers = sorted(self._sums)
        means = torch.stack([self._sums[layer].cpu() for layer in layers]) / self._tokens
        num_experts = (means.shape[1] - 4) // 3
        lists = [part.squeeze(1).tolist() for part in means.split([num_experts] * 3 + [1] * 4, dim=1)]
        return Routing(layers, self._tokens, *lists, num_original_places=self._loaded.num_original_places)


def broken_priors(
    routing: Mapping[str, Routing], original: Collection[str], threshold: float = 0.5
) -> list[BrokenPrior]:
    """Every layer and language with more than `threshold` (a fraction) of the first choices against the language prior.

    `routing`: language -> statistics. `original`: the original languages; all others are expanded ones.
    """
    broken = []
    for language, statistics in routing.items():
        is_original = language in original
        for layer, original_share in zip(statistics.layers, statistics.original_first_share, strict=True):
            wrong = 1 - original_share if is_original else original_share
            if wrong > threshold and not math.isclose(wrong, threshold):
                broken.append(BrokenPrior(language, is_original, layer, wrong))
    return broken
