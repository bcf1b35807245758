"""Random routing, and routers that are made to choose it."""

from typing import Any

import torch
from torch import Tensor

MARGIN = 20.0  # far above the differences between the logits of a router that has just been initialized


def uniform_choices(num_tokens: int, num_experts: int, topk: int, generator: torch.Generator) -> Tensor:
    """[T, K] different experts of each token."""
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :topk]


def impose(router: Any, choices_TK: Tensor) -> None:
    """Make a router, whose `gating` returns logits [..., experts], choose `choices_TK`; its gradients stay its own."""
    gating, raised_TK = router.gating, torch.full(choices_TK.shape, MARGIN, device=choices_TK.device)

    def imposed(hidden: Tensor) -> Tensor:
        logits = gating(hidden)
        shape = (*logits.shape[:-1], choices_TK.shape[1])
        return logits.scatter_add(-1, choices_TK.view(shape), raised_TK.view(shape).to(logits.dtype))

    router.gating = imposed
