"""Architectures that cannot be upcycled, each with the reason: what no stock MoE class, or no layer of Megatron, has.

The converter refuses them with it, and docs/models.md lists them. Found in transformers 5.24 and Megatron Core 0.19.2.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

# Keys of a multimodal model's config.json that have the config of its text model.
_TEXT_CONFIGS = ("text_config", "llm_config")


class Unsupported(NamedTuple):
    """Published models, their architectures, and the reason against them, which follows a colon or an "and"."""

    models: str
    architectures: tuple[str, ...]
    reason: str


_UNGATED = "its FFN is not gated, as the experts of every stock MoE class with its attention are"
_MLA = "it has latent attention (MLA), which the trainer does not have"
_STATES = "some of its layers are no attention but a state space, a convolution or a recurrence"

UNSUPPORTED = (
    Unsupported(
        "Apertus",
        ("ApertusForCausalLM", "Apertus1p5TextForCausalLM"),
        "its FFN is not gated and has the activation xIELU, which the experts of no stock MoE class have",
    ),
    Unsupported(
        "SmolLM3",
        ("SmolLM3ForCausalLM",),
        "every fourth layer has no RoPE (no_rope_layers), and no stock MoE class with its attention can leave it out",
    ),
    Unsupported(
        "Ministral 3",
        ("Ministral3ForCausalLM",),
        "its queries grow with their position (llama_4_scaling_beta), which of the stock MoE classes only "
        "Mistral4ForCausalLM has, with latent attention",
    ),
    Unsupported(
        "Ministral 8B (2024), CWM",
        ("MinistralForCausalLM", "CwmForCausalLM"),
        "only some layers have a sliding window (layer_types), and Mixtral has the same attention in all",
    ),
    Unsupported(
        "Gemma 1, 2, 3 and 3n, VaultGemma",
        ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3nForCausalLM", "VaultGemmaForCausalLM"),
        "its FFN is gated by GELU, and the one stock MoE class with such experts, Gemma 4's, has a dense FFN beside "
        "them and normalizes values",
    ),
    Unsupported(
        "Gemma 4",
        ("Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM"),
        "its MoE class adds the experts, with norms of their own, to a dense FFN that every token passes, so that the "
        "FFN cannot be one of them",
    ),
    Unsupported(
        "Hunyuan 0.5B to 7B",
        ("HunYuanDenseV1ForCausalLM",),
        "its MoE class has an FFN beside the experts in every layer (mlp.shared_mlp), and it normalizes queries and "
        "keys after RoPE, Megatron before it",
    ),
    Unsupported(
        "OLMo 1",
        ("OlmoForCausalLM",),
        "its norms have no weights and subtract the mean, those of OlmoeForCausalLM have weights and do not",
    ),
    Unsupported(
        "OLMo 3",
        ("Olmo3ForCausalLM", "OlmoHybridForCausalLM"),
        "three of four layers have a sliding window (layer_types), and FlexOlmoForCausalLM has none",
    ),
    Unsupported(
        "Command, Aya",
        ("CohereForCausalLM", "Cohere2ForCausalLM"),
        "attention and FFN both read the layer's only norm, side by side, which Megatron Core's layers cannot",
    ),
    Unsupported(
        "GLM-4 9B and 32B",
        ("GlmForCausalLM", "Glm4ForCausalLM"),
        "RoPE turns only half of the channels (partial_rotary_factor), and the stock MoE classes that do so route by "
        "sigmoids or have other attention",
    ),
    Unsupported(
        "StableLM",
        ("StableLmForCausalLM",),
        "RoPE turns only a quarter of the channels (partial_rotary_factor) and norms have biases; no stock MoE class "
        "has both",
    ),
    Unsupported(
        "Nemotron, Minitron 8B, AFM-4.5B, Jais 2, nanochat",
        ("NemotronForCausalLM", "ArceeForCausalLM", "Jais2ForCausalLM", "NanoChatForCausalLM", "PersimmonForCausalLM"),
        f"{_UNGATED}, but has the activation relu2",
    ),
    Unsupported(
        "Falcon 1 and 2, Phi 1 and 2, StarCoder 2, Pythia, GPT-2, BLOOM, OPT, MPT",
        (
            *("FalconForCausalLM", "PhiForCausalLM", "Starcoder2ForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel"),
            *("BloomForCausalLM", "OPTForCausalLM", "MptForCausalLM", "GPTBigCodeForCausalLM", "GPTJForCausalLM"),
        ),
        _UNGATED,
    ),
    Unsupported(
        "InternLM 2 and 3",
        ("InternLM2ForCausalLM", "InternLM3ForCausalLM"),
        "its RoPE is scaled with the length of the text (rope_scaling: dynamic), which Megatron Core cannot",
    ),
    Unsupported(
        "EXAONE 4, HyperCLOVA X",
        ("Exaone4ForCausalLM", "HyperCLOVAXForCausalLM"),
        "it normalizes the outputs of attention and FFN, and the stock MoE classes that do so have other norms of "
        "queries and keys or route by sigmoids",
    ),
    Unsupported(
        "EXAONE 3 and 3.5",
        ("ExaoneForCausalLM",),
        "its tensors have GPT-2's names, though it computes what a Llama does, and the converter has no table of them",
    ),
    Unsupported(
        "Llama-Nemotron Super, Ultra and Nano 8B v1.1",
        ("DeciLMForCausalLM",),
        "its layers have different shapes",
    ),
    Unsupported(
        "Granite with attention sinks",
        ("GraniteSWAForCausalLM",),
        "its attention has sinks (self_attn.sinks), which the trainer does not have",
    ),
    Unsupported(
        "MiniCPM 3, Youtu",
        ("MiniCPM3ForCausalLM", "YoutuForCausalLM"),
        _MLA,
    ),
    Unsupported(
        "LFM2, Falcon H1, Nemotron-H, Jamba, Zamba, Bamba, Mamba, RWKV, RecurrentGemma",
        (
            *("Lfm2ForCausalLM", "Lfm3ForCausalLM", "FalconH1ForCausalLM", "FalconMambaForCausalLM"),
            *("NemotronHForCausalLM", "JambaForCausalLM", "ZambaForCausalLM", "Zamba2ForCausalLM", "BambaForCausalLM"),
            *("MambaForCausalLM", "Mamba2ForCausalLM", "RwkvForCausalLM", "RecurrentGemmaForCausalLM"),
        ),
        _STATES,
    ),
    Unsupported(
        "DeepSeek V2 and V3, Mistral Small 4, GLM-4.7-Flash",
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Mistral4ForCausalLM", "Glm4MoeLiteForCausalLM"),
        _MLA,
    ),
    Unsupported(
        "GLM-4.5, Hunyuan A13B, Llama 4, Phi-3.5-MoE, gpt-oss, dots.llm1",
        (
            *("Glm4MoeForCausalLM", "HunYuanMoEV1ForCausalLM", "Llama4ForCausalLM", "PhimoeForCausalLM"),
            *("GptOssForCausalLM", "Dots1ForCausalLM"),
        ),
        "it is an MoE whose router is not a softmax over its experts, or that has an FFN beside them, so the method's "
        "new experts cannot join its own",
    ),
)


def reason_against(config: dict[str, Any], known_types: Iterable[str]) -> str | None:
    """Why a model with this config.json cannot be upcycled, and what would; None if nothing is known against it.

    Args:
        known_types: The `model_type` of each family that can be upcycled.
    """
    text = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    if text is not None and text.get("model_type") in known_types:
        return (
            f"it is multimodal, and stock MoE classes are not; save its text model, a {text['model_type']}, by itself "
            "as docs/models.md#multimodal-models shows, and convert that"
        )
    architectures = {*(config.get("architectures") or ()), *map(_architecture, (config, text or {}))}
    for entry in UNSUPPORTED:
        if architectures & set(entry.architectures):
            return f"its text model is that of {entry.models}, and {entry.reason}" if text else entry.reason
    return None


def _architecture(config: dict[str, Any]) -> str | None:
    """The language model that transformers makes of a config without `architectures`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    return found if isinstance(found, str) and not config.get("architectures") else None
