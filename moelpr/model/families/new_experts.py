"""The experts that an upcycled model gets, and the spec of the model with them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moelpr.base.errors import UserError
from moelpr.model.families.families import Family
from moelpr.model.model_spec import ModelSpec, MoeSpec

DEFAULT_TOPK = 2  # the paper's K


@dataclass(frozen=True)
class NewExperts:
    """The experts to add to a model, dense or an MoE."""

    num_new_experts: int  # N, per MoE layer
    topk: int | None = None  # K, experts per token; None for 2, or for the MoE's own
    original_copies: int | None = None  # C, the places of the dense FFN, 1 to K; None for 1, or for the MoE's own
    moe_layers: Sequence[int] | None = None  # 0-based layers to upcycle
    moe_every_k_layers: int | None = None  # layers k, 2k, … instead; with neither, all layers

    def with_default_copies(self, base: ModelSpec) -> "NewExperts":
        """The same with C = K for a dense model, unless C is set (docs/results.md compares them)."""
        if self.original_copies is not None or base.moe is not None:
            return self
        return replace(self, original_copies=max(self.topk or DEFAULT_TOPK, 1))


def with_new_experts(family: Family, base: ModelSpec, new: NewExperts) -> ModelSpec:
    """Add N new experts to a dense model's FFN or to an MoE; UserError if the model cannot be trained or exported."""
    layers = _layers(base, new)
    num_layers = base.megatron_args["num_layers"]
    if base.moe is None:
        topk = DEFAULT_TOPK if new.topk is None else new.topk
        copies = 1 if new.original_copies is None else new.original_copies
        moe = MoeSpec(new.num_new_experts, topk, layers, original_copies=copies)
    elif new.original_copies is None:
        topk = base.moe.topk if new.topk is None else new.topk
        copies = max(1, min(base.moe.original_copies, topk))  # further ones are original experts as any
        moe = replace(base.moe, original_copies=copies, num_original_experts=base.moe.num_experts - copies + 1)
        moe = replace(moe, num_new_experts=new.num_new_experts, topk=topk)
    else:
        raise UserError(
            f"--original-copies does not apply to an MoE: its {base.moe.num_experts} experts are all original, so a "
            f"token's {base.moe.topk} choices can be original without copies; remove it"
        )
    spec = replace(base, moe=moe)
    spec.check()
    if not family.moe_class.may_mix_layers and len(layers) < num_layers:
        raise UserError(
            f"{family.architecture} is exported as {family.moe_class.architecture}, which has experts in every layer, "
            f"got {len(layers)} of {num_layers} layers; without --moe-layers and --moe-every-k-layers, all get experts"
        )
    return spec


def _layers(base: ModelSpec, new: NewExperts) -> tuple[int, ...]:
    num_layers, every_k = base.megatron_args["num_layers"], new.moe_every_k_layers
    if new.moe_layers is not None and every_k is not None:
        raise UserError("--moe-layers and --moe-every-k-layers are mutually exclusive; pass only one of them")
    if base.moe is not None:
        if new.moe_layers is not None or every_k is not None:
            raise UserError(
                "new experts join the existing experts of an MoE; remove --moe-layers and --moe-every-k-layers"
            )
        return base.moe.layers
    if new.moe_layers is not None:
        return tuple(sorted(set(new.moe_layers)))
    if every_k is not None and not 1 <= every_k <= num_layers:
        raise UserError(f"--moe-every-k-layers must be 1 to {num_layers} (the model's layers), got {every_k}")
    # Layers k, 2k, 3k, … counted from 1: the rule of decoder_sparse_step in transformers.
    return tuple(i for i in range(num_layers) if (i + 1) % (every_k or 1) == 0)
