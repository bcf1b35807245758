"""Stock MoE classes of transformers: how each names an MoE layer's tensors, its config.json, and what it can hold."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from moelpr.model.families.tables import SHARED_EXPERT, Row, moe_rows
from moelpr.model.model_spec import ModelSpec, MoeSpec


@dataclass(frozen=True)
class Attention:
    """The traits of a decoder that an MoE class must share with the dense models whose upcycled ones it holds."""

    is_hybrid: bool = False  # some layers have linear attention, and the others a gate on attention's output
    qk_norm: bool = False  # attention normalizes queries and keys
    qkv_bias: bool = False  # queries, keys and values have biases
    interleaved_rope: bool = False  # RoPE turns channels 0 and 1, 2 and 3, …, and not the halves of a head
    norms_after: bool = False  # layers normalize outputs, not inputs, and queries and keys over all heads
    multipliers: bool = False  # Granite's

    @classmethod
    def of(cls, args: dict[str, Any]) -> "Attention":
        """The traits of a model by Megatron's arguments."""
        return cls(
            "linear_attention_freq" in args,
            args["qk_layernorm"],
            args["add_qkv_bias"],
            *(args.get(name, False) for name in ("rotary_interleaved", "norms_after", "use_mup")),
        )


# Trait → its name in messages.
_TRAITS = {
    "is_hybrid": "layers with linear attention",
    "qk_norm": "norms of queries and keys",
    "qkv_bias": "biases in attention",
    "interleaved_rope": "interleaved RoPE",
    "norms_after": "norms after attention and FFN",
    "multipliers": "multipliers",
}


@dataclass(frozen=True)
class MoeClass:
    """A class that upcycled models are exported as."""

    name: str  # its `model_type`, which is also its name on the command line
    architecture: str
    ffn: tuple[Row, ...]  # rows of an MoE layer's FFN
    # Maps a spec to the class's own keys of config.json; an imported MoE must have these values.
    config: Callable[[ModelSpec, MoeSpec], dict[str, Any]]
    required: tuple[str, ...]  # keys that an imported MoE's config.json must have; "a or b" is a key of two names
    # HF name → shape of tensors of an MoE layer that only the class has; they are written as zeros.
    zeros: dict[str, str] = field(default_factory=dict)
    # More of them, in a model with biases on queries, keys and values.
    bias_zeros: dict[str, str] = field(default_factory=dict)
    attention: Attention = Attention()
    optional: tuple[str, ...] = ()  # traits of `attention` that config.json decides
    may_mix_layers: bool = False  # whether it supports layers without experts
    may_have_window: bool = False  # whether it supports a sliding window in all layers
    may_set_head_dim: bool = True  # whether heads may be of another width than hidden_size / num_attention_heads

    def misfit(self, spec: ModelSpec) -> str | None:
        """Why the class cannot hold this model exactly; None if it can."""
        args = spec.megatron_args
        head_dim, window = args["kv_channels"], args.get("window_size")
        attention = Attention.of(args)
        for trait, name in _TRAITS.items():
            has_it = getattr(self.attention, trait)
            if trait not in self.optional and has_it != getattr(attention, trait):
                return f"it has {'' if has_it else 'no '}{name}"
        if spec.moe is not None and len(spec.moe.layers) < args["num_layers"] and not self.may_mix_layers:
            return "it has experts in every layer"
        if window is not None and not self.may_have_window:
            return "it has no sliding window"
        if not self.may_set_head_dim and head_dim * args["num_attention_heads"] != args["hidden_size"]:
            return f"its heads are hidden_size / num_attention_heads wide, not {head_dim}"
        return None


def _mixtral_config(spec: ModelSpec, moe: MoeSpec) -> dict[str, Any]:
    window = spec.megatron_args.get("window_size")
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "sliding_window": None if window is None else window[0] + 1,
    }


MIXTRAL = MoeClass(
    name="mixtral",
    architecture="MixtralForCausalLM",
    # Mixtral routes as the method does: softmax over all experts, top-k, renormalize.
    ffn=moe_rows(
        router="model.layers.{i}.block_sparse_moe.gate.weight",
        gate="model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight",
        up="model.layers.{i}.block_sparse_moe.experts.{j}.w3.weight",
        down="model.layers.{i}.block_sparse_moe.experts.{j}.w2.weight",
    ),
    config=_mixtral_config,
    required=("num_local_experts", "num_experts_per_tok"),
    may_have_window=True,
)


def _qwen_moe_config(spec: ModelSpec, moe: MoeSpec, **settings: Any) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        # The classes default to false, which is another model.
        "norm_topk_prob": True,
        "moe_intermediate_size": spec.megatron_args["ffn_hidden_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.megatron_args["num_layers"]) if i not in moe.layers],
        "use_sliding_window": False,
        "sliding_window": None,
        **settings,
    }


_PROJECTIONS = tuple(f"model.layers.{{i}}.mlp.experts.{{j}}.{name}_proj.weight" for name in ("gate", "up", "down"))
_QWEN_MOE_NAMES = ("model.layers.{i}.mlp.gate.weight", *_PROJECTIONS)
_QWEN_MOE_ROWS = moe_rows(*_QWEN_MOE_NAMES)

QWEN2_MOE = MoeClass(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    ffn=_QWEN_MOE_ROWS,
    config=partial(_qwen_moe_config, shared_expert_intermediate_size=0, qkv_bias=True),
    required=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    # Readers expect the shared expert's gate even if the shared expert has width 0.
    zeros={"model.layers.{i}.mlp.shared_expert_gate.weight": "one hidden"},
    attention=Attention(qkv_bias=True),
    may_mix_layers=True,
)

QWEN3_MOE = MoeClass(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    ffn=_QWEN_MOE_ROWS,
    # transformers 5 reads and writes num_local_experts, older readers only num_experts.
    config=lambda spec, moe: _qwen_moe_config(spec, moe, num_local_experts=moe.num_experts),
    required=("num_experts or num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    attention=Attention(qk_norm=True),
    may_mix_layers=True,
)


# Granite's keys of config.json.
MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


def _granite_multipliers(args: dict[str, Any]) -> dict[str, float]:
    """The multipliers of a model; one of another family has those with which Granite computes the same."""
    return {
        "attention_multiplier": args.get("softmax_scale", args["kv_channels"] ** -0.5),
        "embedding_multiplier": args.get("mup_embedding_mult", 1.0),
        "residual_multiplier": args.get("residual_multiplier", 1.0),
        # Megatron multiplies by the reciprocal, whose own is not always exactly the number.
        "logits_scaling": round(1.0 / args.get("mup_output_mult", 1.0), 12),
    }


def has_multipliers(config: dict[str, Any]) -> bool:
    """Whether the config.json of a GraniteMoe asks for another computation than Mixtral's."""
    # transformers refuses others later.
    numbers = {key: value for key, value in config.items() if isinstance(value, int | float) and not abs(value) > 1e30}
    width = numbers.get("head_dim") or numbers.get("hidden_size", 0) / (numbers.get("num_attention_heads") or 1) or 1
    neutral = _granite_multipliers({"kv_channels": abs(width)})
    return any(not math.isclose(numbers.get(name, 1.0), value) for name, value in neutral.items())


def _qwen3_5_moe_config(spec: ModelSpec, moe: MoeSpec) -> dict[str, Any]:
    # It always normalizes the top-k weights, and has experts in every layer.
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": spec.megatron_args["ffn_hidden_size"],
        "shared_expert_intermediate_size": SHARED_EXPERT,
    }


_SHARED = "model.layers.{i}.mlp.shared_expert"
QWEN3_5_MOE = MoeClass(
    name="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    # In stacks, as published models are, and as MLX reads only.
    ffn=moe_rows(
        router="model.layers.{i}.mlp.gate.weight",
        gate="model.layers.{i}.mlp.experts.gate_up_proj[{j},:{ffn}]",
        up="model.layers.{i}.mlp.experts.gate_up_proj[{j},{ffn}:]",
        down="model.layers.{i}.mlp.experts.down_proj[{j}]",
    ),
    config=_qwen3_5_moe_config,
    required=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    # Its shared expert has some width for every reader; the product with a down projection of zeros is zero.
    zeros={
        f"{_SHARED}.gate_proj.weight": "shared hidden",
        f"{_SHARED}.up_proj.weight": "shared hidden",
        f"{_SHARED}.down_proj.weight": "hidden shared",
        f"{_SHARED}_gate.weight": "one hidden",
    },
    attention=Attention(is_hybrid=True, qk_norm=True),
)


def _granite_moe_config(spec: ModelSpec, moe: MoeSpec) -> dict[str, Any]:
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "attention_bias": spec.megatron_args["add_qkv_bias"],
        **_granite_multipliers(spec.megatron_args),
    }


GRANITE_MOE = MoeClass(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    # The softmax of the top-k logits, which is the renormalized softmax of all.
    ffn=moe_rows(
        router="model.layers.{i}.block_sparse_moe.router.layer.weight",
        gate="model.layers.{i}.block_sparse_moe.input_linear.weight[{j},:{ffn}]",
        up="model.layers.{i}.block_sparse_moe.input_linear.weight[{j},{ffn}:]",
        down="model.layers.{i}.block_sparse_moe.output_linear.weight[{j}]",
    ),
    config=_granite_moe_config,
    required=("num_local_experts", "num_experts_per_tok"),
    # One setting gives biases to all four projections, but Qwen2's attention output has none.
    bias_zeros={"model.layers.{i}.self_attn.o_proj.bias": "hidden"},
    optional=("qkv_bias", "multipliers"),
    may_set_head_dim=False,
)


def _ernie_moe_config(spec: ModelSpec, moe: MoeSpec) -> dict[str, Any]:
    return {
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.topk,
        "moe_intermediate_size": spec.megatron_args["ffn_hidden_size"],
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": spec.megatron_args["num_layers"] - 1,
        "moe_layer_interval": 1,
        "use_bias": False,
    }


ERNIE_MOE = MoeClass(
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    # The renormalized softmax of all, chosen by its sum with a bias, which is zero.
    ffn=_QWEN_MOE_ROWS,
    config=_ernie_moe_config,
    required=("moe_num_experts", "moe_k", "moe_intermediate_size"),
    zeros={"model.layers.{i}.mlp.moe_statics.e_score_correction_bias": "one experts"},
    attention=Attention(interleaved_rope=True),
)

FLEX_OLMO = MoeClass(
    name="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    ffn=moe_rows(*_QWEN_MOE_NAMES, norm_after=True),
    config=lambda spec, moe: {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "norm_topk_prob": True,
        "attention_bias": False,
    },
    required=("num_experts", "num_experts_per_tok"),
    attention=Attention(qk_norm=True, norms_after=True),
)

_ALL = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, QWEN3_5_MOE, GRANITE_MOE, ERNIE_MOE, FLEX_OLMO)
MOE_CLASSES = {kind.name: kind for kind in _ALL}
