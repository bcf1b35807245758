"""Where tokens go: statistics of every router of a stock Hugging Face MoE model, taken during its own forward pass.

T = tokens of a batch, E = experts, of which the first m are the original ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Routing of one language's text, averaged over its tokens. Lists run over MoE layers, then over experts."""

    layers: list[int]  # numbers of the decoder layers that are MoE layers, counted from 0
    tokens: int
    first_choice_share: list[list[float]]  # share of tokens whose highest router score is this expert's
    mean_score: list[list[float]]  # mean softmax score
    num_original_experts: int = 1  # m

    @property
    def original_expert_share(self) -> dict[str, Any]:
        """Share of first choices that are an original expert: {"overall": share, "per_layer": [..], "layers": [..]}.

        `layers` says which decoder layer each entry of `per_layer` is.
        """
        per_layer = [sum(shares[: self.num_original_experts]) for shares in self.first_choice_share]
        return {"overall": sum(per_layer) / len(per_layer), "per_layer": per_layer, "layers": self.layers}


def find_routers(model: Any) -> dict[int, nn.Module]:
    """Router of each MoE layer by decoder layer number; empty for a dense model.

    Mixtral, Qwen2Moe and Qwen3Moe all name it `gate` and give it a weight [E, hidden].
    """
    config = model.config
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    layers = getattr(model.get_decoder(), "layers", None)
    if not num_experts or layers is None:
        return {}
    return {
        number: module
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if name.rsplit(".", 1)[-1] == "gate" and module.weight.shape[0] == num_experts
    }


class RoutingObserver:
    """Adds up what the routers of one model decide for the tokens that are counted."""

    def __init__(self, model: Any):
        self._routers = find_routers(model)
        # Our exports say it in their config.json; the stock classes keep what they don't know.
        self._num_original_experts = getattr(model.config, "num_original_experts", 1)
        self.reset()

    def reset(self) -> None:
        """Start again from nothing, for the next language."""
        self._tokens = 0
        self._first_choices = {number: _zeros(router) for number, router in self._routers.items()}  # [E] each
        self._scores = {number: _zeros(router) for number, router in self._routers.items()}  # [E] each

    @contextmanager
    def observe(self, is_counted: Tensor) -> Iterator[None]:
        """Count the forward passes inside the `with` block. is_counted: bool, the shape of the input tokens."""
        if not self._routers:
            yield
            return
        weight_T = is_counted.flatten().double()
        self._tokens += int(is_counted.sum())
        hooks = [router.register_forward_hook(self._hook(number, weight_T)) for number, router in self._routers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, number: int, weight_T: Tensor) -> Any:
        def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
            logits_TE = output[0] if isinstance(output, tuple) else output  # (logits, top-k weights, top-k indices)
            scores_TE = logits_TE.reshape(weight_T.numel(), -1).float().softmax(dim=-1)
            self._first_choices[number].index_add_(0, scores_TE.argmax(dim=-1), weight_T)
            self._scores[number] += weight_T @ scores_TE.double()

        return add

    def result(self) -> Routing | None:
        """Statistics since the last reset; None for a dense model or where no token was counted."""
        if not self._routers or self._tokens == 0:
            return None
        return Routing(
            layers=list(self._routers),
            tokens=self._tokens,
            first_choice_share=[(counts / self._tokens).tolist() for counts in self._first_choices.values()],
            mean_score=[(scores / self._tokens).tolist() for scores in self._scores.values()],
            num_original_experts=self._num_original_experts,
        )


def _zeros(router: Any) -> Tensor:
    return torch.zeros(router.weight.shape[0], dtype=torch.float64, device=router.weight.device)
