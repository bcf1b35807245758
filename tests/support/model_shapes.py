"""The config.json of published models, for what reads only their shape."""

import json
from pathlib import Path
from typing import Any

# Hidden size, FFN, layers, heads, query groups, vocabulary.
SHAPES = {
    "Qwen1.5-1.8B": (2048, 5504, 24, 16, 16, 151936),
    "Qwen2.5-72B": (8192, 29568, 80, 64, 8, 152064),
    "Qwen3-0.6B-Base": (1024, 3072, 28, 16, 8, 151936),
    "Qwen3-1.7B-Base": (2048, 6144, 28, 16, 8, 151936),
    "Qwen3-8B-Base": (4096, 12288, 36, 32, 8, 151936),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256),
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152),
    "Granite-3.1-3B-A800M": (1536, 512, 32, 24, 8, 49155),
    # The default of transformers' class.
    "Qwen3.5-9B-Base": (4096, 12288, 32, 16, 4, 248320),
}
TIED = ("Qwen3-0.6B-Base", "Qwen3-1.7B-Base", "SmolLM2-135M", "Granite-3.1-3B-A800M")
_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE |= {"original_max_position_embeddings": 8192}
_FAMILIES = {
    "Qwen3.5": {
        "model_type": "qwen3_5_text",
        **{"head_dim": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_num_key_heads": 16},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "partial_rotary_factor": 0.25},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
    "Qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
    "Qwen": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "SmolLM2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "Llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": _ROPE},
    "Granite": {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        **{"num_local_experts": 40, "num_experts_per_tok": 8, "attention_multiplier": 0.015625},
        **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    },
}


def save_config(name: str, folder: Path) -> None:
    """Write the config.json of a model into a folder."""
    hidden, ffn, layers, heads, groups, vocabulary = SHAPES[name]
    config: dict[str, Any] = {
        **next(family for start, family in _FAMILIES.items() if name.startswith(start)),
        **{"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocabulary},
        **{"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 131072},
        **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": name in TIED},
        "torch_dtype": "bfloat16",
    }
    if name.startswith("Qwen3.5"):
        config["linear_num_value_heads"] = 2 * heads
        whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
        config = whole | {"tie_word_embeddings": config["tie_word_embeddings"], "text_config": config}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
