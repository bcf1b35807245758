"""The flags for new experts, which the planner and the converter share."""

import argparse
from typing import Annotated

from moelpr.base.settings import Flags, either
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec


def _layer_list(text: str) -> list[int]:
    """Parse --moe-layers: comma-separated layer numbers, 0-based."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layer numbers like 0,2,5, got {text!r}") from None


class ExpertFlags(Flags):
    """experts"""

    topk: int | None = None  # experts per token (default: 2; in an MoE, its own)
    original_copies: int | None = None  # places of the dense FFN, 1 (the paper) to K (default: K; in an MoE, its own)
    # layers to upcycle, 0-based (default: all)
    moe_layers: Annotated[list[int] | None, either("layers"), {"nargs": None, "type": _layer_list}] = None
    moe_every_k_layers: Annotated[int | None, either("layers")] = None  # upcycle layers k, 2k, 3k, …, 1-based

    def experts(self, number: int, base: ModelSpec) -> NewExperts:
        """The experts that the flags ask for."""
        experts = number, self.topk, self.original_copies, self.moe_layers, self.moe_every_k_layers
        return NewExperts(*experts).with_default_copies(base)
