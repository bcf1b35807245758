"""Where tokens go: statistics of every router of a model, taken during its own forward pass.

T = tokens of a batch, E = experts, of which the first m are the original ones, K = experts per token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelpr.evaluate.models import LoadedModel


@dataclass(frozen=True)
class Routing:
    """Routing of one language's text, averaged over its tokens. Lists run over MoE layers, then over experts."""

    layers: list[int]  # numbers of the decoder layers that are MoE layers, counted from 0
    tokens: int
    first_choice_share: list[list[float]]  # share of tokens whose highest router score is this expert's
    chosen_share: list[list[float]]  # share of tokens that this expert works for; a layer's add up to K
    mean_score: list[list[float]]  # mean softmax score
    entropy: list[float]  # of a token's router scores, mean over tokens, in nats; at most ln E
    original_chosen_share: list[float]  # share of tokens with at least one original expert among their K
    num_original_experts: int = 1  # m

    @property
    def num_experts(self) -> int:
        return len(self.mean_score[0])

    @property
    def original_first_share(self) -> list[float]:
        """Share of first choices that are an original expert, per layer."""
        return [sum(shares[: self.num_original_experts]) for shares in self.first_choice_share]

    @property
    def original_expert_share(self) -> dict[str, Any]:
        """The same with its mean: {"overall": share, "per_layer": [..], "layers": [..]}.

        `layers` says which decoder layer each entry of `per_layer` is.
        """
        per_layer = self.original_first_share
        return {"overall": sum(per_layer) / len(per_layer), "per_layer": per_layer, "layers": self.layers}

    @property
    def load_imbalance(self) -> list[float]:
        """Rows of the busiest expert divided by the mean over experts, per layer; from 1 (even) to E / K."""
        return [max(shares) * len(shares) / sum(shares) for shares in self.chosen_share]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RoutingObserver:
    """Adds up what the routers of one model decide for the tokens that are counted."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self._routers = loaded.routers
        self.reset()

    def reset(self) -> None:
        """Start again from nothing, for the next language."""
        self._tokens = 0
        self._sums: dict[int, Tensor] = {}  # layer -> [3 E + 2], see `_vector`

    @contextmanager
    def observe(self, is_counted: Tensor) -> Iterator[None]:
        """Count the forward passes inside the `with` block. is_counted: bool, the shape of the input tokens."""
        if not self._routers:
            yield
            return
        weight_T = is_counted.flatten().float()
        self._tokens += int(is_counted.sum())
        hooks = [router.register_forward_hook(self._hook(number, weight_T)) for number, router in self._routers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, number: int, weight_T: Tensor) -> Any:
        def add(router: nn.Module, inputs: Any, output: Any) -> None:
            vector = self._vector(self._loaded.router_logits(router, inputs, output).float(), weight_T)
            self._sums[number] = vector if number not in self._sums else self._sums[number] + vector

        return add

    def _vector(self, logits_TE: Tensor, weight_T: Tensor) -> Tensor:
        """Sums over the counted tokens: first choices [E], choices [E], scores [E], entropy, original among the K."""
        log_scores_TE = logits_TE.log_softmax(dim=-1)
        scores_TE = log_scores_TE.exp()
        choices_TK = logits_TE.topk(self._loaded.topk, dim=-1).indices
        is_first_TE, is_chosen_TE = torch.zeros_like(scores_TE), torch.zeros_like(scores_TE)
        is_first_TE.scatter_(1, choices_TK[:, :1], 1.0)
        is_chosen_TE.scatter_(1, choices_TK, 1.0)
        entropy_T = -(scores_TE * log_scores_TE).sum(dim=-1, keepdim=True)
        has_original_T = is_chosen_TE[:, : self._loaded.num_original_experts].amax(dim=-1, keepdim=True)
        columns = torch.cat([is_first_TE, is_chosen_TE, scores_TE, entropy_T, has_original_T], dim=-1)
        return (weight_T @ columns).double()  # a batch's counts are exact in float32

    def result(self) -> Routing | None:
        """Statistics since the last reset; None for a dense model or where no token was counted."""
        if not self._sums or self._tokens == 0:
            return None
        means = {number: (sums / self._tokens).tolist() for number, sums in sorted(self._sums.items())}
        num_experts = (len(next(iter(means.values()))) - 2) // 3
        first, chosen, score = (slice(part * num_experts, (part + 1) * num_experts) for part in range(3))
        return Routing(
            layers=list(means),
            tokens=self._tokens,
            first_choice_share=[values[first] for values in means.values()],
            chosen_share=[values[chosen] for values in means.values()],
            mean_score=[values[score] for values in means.values()],
            entropy=[values[-2] for values in means.values()],
            original_chosen_share=[values[-1] for values in means.values()],
            num_original_experts=self._loaded.num_original_experts,
        )


@dataclass(frozen=True)
class BrokenPrior:
    """A layer that sends more than the allowed share of a language's tokens to the wrong kind of expert."""

    language: str
    is_original: bool  # original language: too many tokens choose a new expert first; else: an original expert
    layer: int
    share: float  # of this language's tokens that go the wrong way


def broken_priors(routing: dict[str, Routing], original: list[str], threshold: float = 0.5) -> list[BrokenPrior]:
    """Every layer and language where more than `threshold` of the first choices break the language prior.

    routing: language -> statistics. original: the original languages; the others are expanded ones.
    """
    broken = []
    for language, statistics in routing.items():
        is_original = language in original
        for layer, original_share in zip(statistics.layers, statistics.original_first_share, strict=True):
            wrong = 1 - original_share if is_original else original_share
            if wrong > threshold and not math.isclose(wrong, threshold):
                broken.append(BrokenPrior(language, is_original, layer, wrong))
    return broken
