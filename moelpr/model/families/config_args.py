"""Megatron's arguments for a config.json, and the keys of a config.json for Megatron's arguments."""

import math
from typing import Any

from moelpr.base.errors import UserError
from moelpr.model.families.moe_classes import MIXTRAL, MULTIPLIERS, Attention
from moelpr.model.model_spec import ModelSpec

# Values of `model_type` whose keys mean something else than those of other Llama-like models.
MISTRAL_TYPE, PHI3_TYPE, GRANITE_4_TYPE = "mistral", "phi3", "granitemoehybrid"

# Biases that a family's key may ask for, and that Megatron's layers, or the stock classes, lack.
_OTHER_BIASES = ("attention_out_bias", "mlp_bias", "use_bias")

# Llama 3's RoPE scaling has four settings; Megatron takes only the factor and hard-codes these.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def megatron_args(config: Any, attention: Attention, ffn_size: str) -> dict[str, Any]:
    """Megatron's arguments for a Llama-like decoder, whose FFN's width has the key `ffn_size`.

    Raises:
        UserError: Megatron would compute something else.
    """
    if config.hidden_act != "silu":
        raise UserError(f"hidden_act must be 'silu' (SwiGLU), got {config.hidden_act!r}")
    if getattr(config, "use_sliding_window", False):  # Megatron has one window for all layers
        raise UserError("use_sliding_window: true is unsupported: only some layers have a sliding window")
    if config.model_type == GRANITE_4_TYPE and config.num_local_experts:
        raise UserError(
            f"num_local_experts must be 0, got {config.num_local_experts}: it has an FFN beside its experts"
        )
    if config.model_type == GRANITE_4_TYPE and config.position_embedding_type != "rope":
        raise UserError(f"position_embedding_type must be 'rope', got {config.position_embedding_type!r}")
    known = set(_LAYER_TYPES) if attention.is_hybrid else {"full_attention"}
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - known):
        raise UserError(f"layer_types must be {' or '.join(sorted(known))}, got also {', '.join(map(str, others))}")
    # attention_bias is read as a family's biases on queries, keys and values; GraniteMoe's fourth must be zero.
    expected_biases = {"attention_bias": attention.qkv_bias} | dict.fromkeys(_OTHER_BIASES, False)
    for name, expected in expected_biases.items():
        if bool(has_it := getattr(config, name, expected)) != expected:
            has = "has these biases" if has_it else "lacks these biases"
            raise UserError(f"{name}: {str(has_it).lower()} is unsupported: no stock MoE class {has}")
    # Other classes ignore the key.
    window = config.sliding_window if config.model_type in (MISTRAL_TYPE, PHI3_TYPE, MIXTRAL.name) else None
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": getattr(config, ffn_size),
        "num_attention_heads": heads,
        "num_query_groups": config.num_key_value_heads,
        "group_query_attention": config.num_key_value_heads != heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        **_rope_args(config, attention.is_hybrid),
        # Hugging Face's window includes the current token, Megatron's counts the tokens before it.
        **({"window_size": [window - 1, 0]} if window else {}),
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": attention.qkv_bias,
        "qk_layernorm": attention.qk_norm,
        **({"rotary_interleaved": True} if attention.interleaved_rope else {}),
        **({"norms_after": True} if attention.norms_after else {}),
        **(_multiplier_args(config) if attention.multipliers else {}),
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        # Megatron's defaults are 0.1.
        "attention_dropout": float(getattr(config, "attention_dropout", 0.0)),
        "hidden_dropout": 0.0,
        "init_method_std": config.initializer_range,
        **(_hybrid_args(config) if attention.is_hybrid else {}),
    }


def _multiplier_args(config: Any) -> dict[str, Any]:
    """Granite's multipliers: three are those of Megatron's muP, at whose base width nothing else changes."""
    for name in MULTIPLIERS:
        if not 0 < (value := getattr(config, name)) < math.inf:
            raise UserError(f"{name} must be above 0, got {value}")
    return {
        "softmax_scale": float(config.attention_multiplier),
        "residual_multiplier": float(config.residual_multiplier),
        "use_mup": True,
        "mup_embedding_mult": float(config.embedding_multiplier),
        "mup_output_mult": 1.0 / config.logits_scaling,
    }


def _rope_args(config: Any, partial: bool) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    rotated = rope.get("partial_rotary_factor", 1.0)
    if rotated != 1.0 and not partial:
        raise UserError(f"partial_rotary_factor must be 1, got {rotated}")
    if "rope_theta" not in rope:  # they are per type of layer
        raise UserError(f"rope_parameters must be the same in all layers, got some for each of {', '.join(rope)}")
    theta = rope["rope_theta"]
    if theta != int(theta):
        raise UserError(f"rope_theta must be an integer for Megatron, got {theta}")
    args = {"rotary_base": int(theta), "rotary_percent": float(rotated)}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return args
    if kind != "llama3":
        raise UserError(f"RoPE scaling must be 'default' (none) or 'llama3', got {kind!r}")
    for name, expected in _LLAMA3_ROPE.items():
        if rope.get(name) != expected:
            raise UserError(f"{name} of RoPE scaling 'llama3' must be {expected} for Megatron, got {rope.get(name)}")
    return args | {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


_LAYER_TYPES = {"full_attention": 0, "linear_attention": 1}
_LINEAR_SIZES = tuple(
    f"linear_{name}" for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
)


def _hybrid_args(config: Any) -> dict[str, Any]:
    """Megatron's arguments for a decoder of full and linear attention, in addition to a Llama-like one's."""
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise UserError(
            f"linear_num_value_heads ({config.linear_num_value_heads}) must be a multiple of linear_num_key_heads "
            f"({config.linear_num_key_heads})"
        )
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [_LAYER_TYPES[kind] for kind in config.layer_types],
        **{name: getattr(config, name) for name in _LINEAR_SIZES},
        "linear_conv_kernel_dim": config.linear_conv_kernel_dim,
        "attention_output_gate": True,
        "apply_layernorm_1p": True,
    }


def rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    """The `rope_parameters` of config.json."""
    args = spec.megatron_args
    rope = {"rope_theta": args["rotary_base"], "rope_type": "default"}
    if "linear_attention_freq" in args:  # hybrid classes have a default below 1
        rope["partial_rotary_factor"] = args["rotary_percent"]
    if args.get("use_rope_scaling"):
        rope |= {"rope_type": "llama3", "factor": args["rope_scaling_factor"], **_LLAMA3_ROPE}
    return rope


def explicit_shape(spec: ModelSpec) -> dict[str, Any]:
    """The shape, with all keys: a base may omit the defaults of its class, but the MoE class has other defaults."""
    args = spec.megatron_args
    hybrid: dict[str, Any] = {}
    if (kinds := args.get("linear_attention_freq")) is not None:
        names = {number: kind for kind, number in _LAYER_TYPES.items()}
        hybrid = {name: args[name] for name in (*_LINEAR_SIZES, "linear_conv_kernel_dim")}
        hybrid |= {"layer_types": [names[kind] for kind in kinds], "attn_output_gate": True}
        # Keys that readers other than transformers take in place of layer_types.
        interval = kinds.index(0) + 1 if 0 in kinds else 0
        if kinds == [int(not interval or (i + 1) % interval > 0) for i in range(len(kinds))]:
            hybrid["full_attention_interval"] = interval
    return {
        "hidden_size": args["hidden_size"],
        "intermediate_size": args["ffn_hidden_size"],
        "num_hidden_layers": args["num_layers"],
        "num_attention_heads": args["num_attention_heads"],
        "num_key_value_heads": args["num_query_groups"],
        "head_dim": args["kv_channels"],
        "hidden_act": "silu",
        "max_position_embeddings": args["max_position_embeddings"],
        "rms_norm_eps": args["norm_epsilon"],
        "attention_dropout": args["attention_dropout"],
        "initializer_range": args["init_method_std"],
        **hybrid,
    }
