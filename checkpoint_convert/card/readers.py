"""Say which programs run an export as transformers does, from its config.json.

docs/serving.md shows where this was seen.

A program that cannot load an export says so. One that ignores a setting computes another model and says nothing.
"""

import math
from typing import Any

from moelpr.model.families.families import Family
from moelpr.model.families.moe_classes import (
    FLEX_OLMO,
    GRANITE_MOE,
    MIXTRAL,
    MOE_CLASSES,
    QWEN2_MOE,
    QWEN3_5_MOE,
    QWEN3_MOE,
)
from moelpr.model.model_spec import ModelSpec

# Name on the command line → name in sentences.
READERS = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp (Ollama, LM Studio)", "mlx": "MLX"}


def obstacle(reader: str, config: dict[str, Any]) -> str | None:
    """The reason why the reader does not compute an export with this config.json as transformers does, if any."""
    window, head_dim = config.get("sliding_window"), config.get("head_dim")
    is_windowed = window is not None and window < (config.get("max_position_embeddings") or math.inf)
    is_scaled = config.get("rope_scaling") is not None
    has_own_head_dim = head_dim not in (None, config["hidden_size"] // (config["num_attention_heads"] or 1))
    other_head_dim = f"it assumes that heads are not {head_dim} wide"
    irregular = "it requires full attention in every k-th layer"
    rules = (
        ("vllm", QWEN2_MOE, has_own_head_dim, other_head_dim),
        ("vllm", GRANITE_MOE, config.get("attention_bias"), "it has no biases in this class"),
        ("llama.cpp mlx", MIXTRAL, is_windowed, f"it ignores the sliding window of {window} tokens"),
        ("mlx", MIXTRAL, is_scaled, "it ignores RoPE scaling"),
        ("mlx", MIXTRAL, has_own_head_dim, other_head_dim),
        ("llama.cpp mlx", QWEN2_MOE, True, "it requires a shared expert and does not normalize top-k weights"),
        ("llama.cpp", QWEN3_MOE, config.get("mlp_only_layers"), "it requires experts in every layer"),
        ("llama.cpp mlx", QWEN3_MOE, is_scaled, "it ignores RoPE scaling"),
        ("llama.cpp", GRANITE_MOE, is_scaled, "its converter has no RoPE scaling in this class"),
        ("llama.cpp mlx", QWEN3_5_MOE, not config.get("full_attention_interval"), irregular),
        ("mlx", QWEN3_5_MOE, "vision_config" not in config, "it knows this class only in a multimodal model"),
        ("llama.cpp", FLEX_OLMO, True, "its converter does not know this class"),
        ("mlx", FLEX_OLMO, True, "it does not know this class"),
    )
    for readers, kind, applies, reason in rules:
        if reader in readers.split() and [kind.architecture] == config["architectures"] and applies:
            return reason
    return None


def readers_sentence(family: Family, spec: ModelSpec, config: dict[str, Any]) -> str:
    """Say which readers run the export with this config.json, and which --as of moelpr model export the others need."""
    if spec.moe is None:
        return "Runs wherever its base runs."
    others: dict[str, list[str]] = {}
    for reader, name in READERS.items():
        if (reason := obstacle(reader, config)) is not None:
            fitting = [
                kind.name
                for kind in MOE_CLASSES.values()
                if kind.misfit(spec) is None
                and obstacle(reader, family.written_as(kind).export_config({}, spec, spec.dtype)) is None
            ]
            remedy = (
                f"use moelpr model export --as {' or '.join(fitting)}" if fitting else f"no class will do, as {reason}"
            )
            others.setdefault(remedy, []).append(name)
    running = [name for reader, name in READERS.items() if reader != "vllm" and obstacle(reader, config) is None]
    loads = "; vLLM should run it, but only its loader was tested" if obstacle("vllm", config) is None else ""
    sentences = [f"Runs in {_listed(running)}{loads}."]
    sentences += [f"For {_listed(names)}, {remedy}." for remedy, names in others.items()]
    return " ".join(sentences)


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
