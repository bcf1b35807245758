"""config.json read into Megatron's arguments, and written for the class a model leaves as."""

import json
from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec

CONFIG_FILE = "config.json"

# Llama 3's RoPE scaling has four settings; Megatron takes the factor alone and has these in its code.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; UserError when the folder or the file isn't there or isn't JSON."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; a model from the Hugging Face hub must be downloaded first "
            "(hf download NAME --local-dir DIR)"
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}, so it is no Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config


def load_config(folder: Path) -> Any:
    """The folder's config as transformers reads it, with its class's defaults filled in. UserError where it can't."""
    from transformers import AutoConfig

    if "quantization_config" in read_config(folder):
        raise UserError(f"{folder} is quantised (quantization_config); convert the unquantised model")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged config makes transformers raise
        raise UserError(
            f"{folder}/config.json can't be read by transformers: {' '.join(str(error).split())}"
        ) from error


def llama_like_args(config: Any) -> dict[str, Any]:
    """Megatron's arguments for a decoder of Llama's kind, from transformers' config of the dense or the MoE class.

    Raises:
        UserError: Megatron, or the stock MoE class, would compute something else.
    """
    if config.hidden_act != "silu":
        raise UserError(f"found hidden_act {config.hidden_act!r}; only 'silu' (SwiGLU) is supported")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UserError(f"found {name}: true; no stock MoE class has these biases, so it can't be upcycled")
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": config.num_key_value_heads,
        "group_query_attention": config.num_key_value_heads != heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        **_rope_args(config),
        **_window_args(config),
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        # Megatron's defaults are 0.1.
        "attention_dropout": float(config.attention_dropout),
        "hidden_dropout": 0.0,
        "init_method_std": config.initializer_range,
    }


def refuse_window_layers(config: Any) -> None:
    """UserError for a Qwen whose upper layers have sliding windows: Megatron's layers all have the same."""
    if getattr(config, "use_sliding_window", False):
        raise UserError("found use_sliding_window: true; models with windows in some layers only can't be converted")


def _rope_args(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("found a partial_rotary_factor other than 1; only full rotary embeddings are supported")
    theta = rope["rope_theta"]
    if theta != int(theta):
        raise UserError(f"found rope_theta {theta}; Megatron takes whole numbers only")
    args = {"rotary_base": int(theta), "rotary_percent": 1.0}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return args
    if kind != "llama3":
        raise UserError(f"found RoPE scaling {kind!r}; only plain RoPE ('default') and 'llama3' are supported")
    for name, wanted in _LLAMA3_ROPE.items():
        if rope.get(name) != wanted:
            raise UserError(
                f"found RoPE scaling 'llama3' with {name} {rope.get(name)}; Megatron computes {wanted} only"
            )
    return args | {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


def _window_args(config: Any) -> dict[str, Any]:
    """Hugging Face counts the token itself among its window, Megatron the tokens before it."""
    window = getattr(config, "sliding_window", None)
    return {} if not window else {"window_size": [window - 1, 0]}


def rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    """RoPE in config.json's words."""
    args = spec.megatron_args
    if not args.get("use_rope_scaling"):
        return {"rope_theta": args["rotary_base"], "rope_type": "default"}
    return {
        "rope_theta": args["rotary_base"],
        "rope_type": "llama3",
        "factor": args["rope_scaling_factor"],
        **_LLAMA3_ROPE,
    }


def sliding_window(spec: ModelSpec) -> int | None:
    window = spec.megatron_args.get("window_size")
    return None if window is None else window[0] + 1


def exported_config(base: dict[str, Any], spec: ModelSpec, architecture: str, dtype: str) -> dict[str, Any]:
    """config.json of the dense class, or what all MoE classes share: the base's keys, and in both spellings what
    transformers 5 spells anew. Other readers know the old one only and would silently fall back to another value."""
    rope = rope_parameters(spec)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **base,
        "architectures": [architecture],
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": spec.megatron_args["vocab_size"],
        "tie_word_embeddings": not spec.megatron_args["untie_embeddings_and_output_weights"],
    }


def explicit_shape(spec: ModelSpec) -> dict[str, Any]:
    """The shape in config.json's words. A base may leave out what its class defaults to; the MoE class defaults to
    something else."""
    args = spec.megatron_args
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
    }
