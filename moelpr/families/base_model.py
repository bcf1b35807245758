"""The model that is upcycled: dense, or a stock MoE, whose experts are then all original ones."""

import argparse
from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.families.families import Family, family_of
from moelpr.families.hf_config import load_config, read_config
from moelpr.model_spec import ModelSpec, MoeSpec


def read_base(folder: Path) -> tuple[Family, ModelSpec]:
    """Family and shape of a Hugging Face folder, from its config.json alone; of an MoE with no new experts.

    The spec's dtype is that of config.json and may not be the weights'. UserError for a model we can't bring in.
    """
    raw = read_config(folder)
    family, is_moe = family_of(raw)
    config = load_config(folder)
    try:
        args = family.megatron_args(config)
        moe = _experts(config, family, args, raw) if is_moe else None
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    return family, ModelSpec(family.name, "float32", args, moe)


def with_new_experts(
    family: Family,
    base: ModelSpec,
    num_new_experts: int,
    topk: int | None = None,
    moe_layers: list[int] | None = None,
    moe_every_k_layers: int | None = None,
) -> ModelSpec:
    """The spec of `base` with new experts: beside the FFN of a dense model, beside all experts of an MoE.

    topk: None for 2, or the MoE's own. UserError for experts that can't be trained or exported.
    """
    layers = _choose_layers(base, moe_layers, moe_every_k_layers)
    num_layers = base.megatron_args["num_layers"]
    if base.moe is None:
        moe = MoeSpec(num_new_experts, 2 if topk is None else topk, layers)
        if not family.may_mix_layers and 0 < len(layers) < num_layers:
            raise UserError(
                f"a {family.architecture} is exported as {family.moe_architecture}, which has experts in every layer; "
                "drop --moe-layers and --moe-every-k-layers"
            )
    else:
        moe = MoeSpec(num_new_experts, base.moe.topk if topk is None else topk, layers, base.moe.num_experts)
    spec = ModelSpec(base.family, base.dtype, base.megatron_args, moe)
    spec.check()
    return spec


def _choose_layers(base: ModelSpec, chosen: list[int] | None, every_k: int | None) -> tuple[int, ...]:
    num_layers = base.megatron_args["num_layers"]
    if chosen is not None and every_k is not None:
        raise UserError("--moe-layers and --moe-every-k-layers exclude each other; give one of them")
    if base.moe is not None:
        if chosen is not None or every_k is not None:
            raise UserError("the model has experts already, and new ones join them; drop the choice of layers")
        return base.moe.layers
    if chosen is not None:
        return tuple(sorted(set(chosen)))
    if every_k is not None and not 1 <= every_k <= num_layers:
        raise UserError(f"--moe-every-k-layers {every_k} must lie between 1 and the model's {num_layers} layers")
    # Layers k, 2k, 3k, … counted from 1: the rule of decoder_sparse_step in transformers.
    return tuple(i for i in range(num_layers) if (i + 1) % (every_k or 1) == 0)


def _experts(config: Any, family: Family, args: dict[str, Any], raw: dict[str, Any]) -> MoeSpec:
    """An MoE's experts, all original; sets the FFN's size in `args`.

    UserError where config.json says anything else than what we would write for these experts.
    """
    num_layers = args["num_layers"]
    dense = set(getattr(config, "mlp_only_layers", None) or [])
    layers = tuple(i for i in range(num_layers) if i not in dense)
    expert_ffn = getattr(config, "moe_intermediate_size", args["ffn_hidden_size"])
    if dense and expert_ffn != args["ffn_hidden_size"]:
        raise UserError(
            f"found layers without experts whose FFN is {args['ffn_hidden_size']} wide, and experts of {expert_ffn}; "
            "both must have one width"
        )
    args["ffn_hidden_size"] = expert_ffn
    num_experts = next(getattr(config, name) for name in ("num_experts", "num_local_experts") if hasattr(config, name))
    moe = MoeSpec(0, config.num_experts_per_tok, layers, num_experts)
    for name, wanted in family.moe_config(ModelSpec(family.name, "float32", args, moe)).items():
        found = getattr(config, name, raw.get(name, wanted))
        if found != wanted and (found or wanted):  # 0, [] and null say the same
            raise UserError(
                f"found {name} {found}; experts can be added to a {family.moe_architecture} with {wanted} only"
            )
    return moe


def layer_list(text: str) -> list[int]:
    """The value of --moe-layers: comma-separated layer numbers, counted from 0."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer numbers like 0,2,5") from None
