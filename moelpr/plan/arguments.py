"""The flags for new experts, which the planner and the converter share."""

import argparse

from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec


def add_expert_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags for new experts but --num-new-experts."""
    copies = (
        "places of the dense FFN among the experts, 1 (the paper) to K; with K, a token can choose only the dense FFN "
        "(default: K; in an MoE, the equal experts that it has)"
    )
    parser.add_argument("--topk", type=int, metavar="K", help="experts per token (default: 2; in an MoE, its own)")
    parser.add_argument("--original-copies", type=int, metavar="C", help=copies)
    layers = parser.add_mutually_exclusive_group()
    add = layers.add_argument
    add("--moe-layers", type=_layer_list, metavar="0,2,5", help="layers to upcycle, 0-based (default: all)")
    add("--moe-every-k-layers", type=int, metavar="k", help="upcycle layers k, 2k, 3k, …, 1-based")


def new_experts(args: argparse.Namespace, base: ModelSpec) -> NewExperts:
    """The experts that the flags ask for."""
    experts = args.num_new_experts, args.topk, args.original_copies, args.moe_layers, args.moe_every_k_layers
    return NewExperts(*experts).with_default_copies(base)


def _layer_list(text: str) -> list[int]:
    """Parse --moe-layers: comma-separated layer numbers, 0-based."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layer numbers like 0,2,5, got {text!r}") from None
