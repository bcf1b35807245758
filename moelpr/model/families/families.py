"""Model families: the name table, the config.json and the stock MoE classes of each, and the models they can upcycle.

To add a family, write its entry and name it in the order below; docs/design/families.md works through an example.
The MoE classes are in moe_classes.py.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.model.families.config_args import (
    GRANITE_4_TYPE,
    MISTRAL_TYPE,
    PHI3_TYPE,
    explicit_shape,
    megatron_args,
    rope_parameters,
)
from moelpr.model.families.hf_config import TEXT_CLASSES, read_config, transformers_config
from moelpr.model.families.moe_classes import (
    ERNIE_MOE,
    FLEX_OLMO,
    GRANITE_MOE,
    MIXTRAL,
    MOE_CLASSES,
    QWEN2_MOE,
    QWEN3_5_MOE,
    QWEN3_MOE,
    Attention,
    MoeClass,
    has_multipliers,
)
from moelpr.model.families.tables import NameTable, hybrid_table, llama_like_table, norms_after_table
from moelpr.model.model_spec import MAX_EXPERTS, ModelSpec, MoeSpec

# Key of an export's config.json: how many of its experts, from the first, are copies of the dense FFN; none means 1.
COPIES_KEY = "original_copies"

# transformers has defaults for these, which are another model's.
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Family:
    """A supported dense architecture, and the stock MoE class that its upcycled models are read and written as."""

    name: str
    architecture: str
    model_type: str
    moe_class: MoeClass
    attention: Attention = Attention()
    dense_names: dict[str, str] = field(default_factory=dict)  # Llama's tensor names → its own, where they differ
    ffn_size: str = "intermediate_size"  # the key of config.json with the FFN's width

    @property
    def table(self) -> NameTable:
        """The names of dense models, and of upcycled ones in `moe_class`."""
        attention = self.attention
        zeros = self.moe_class.zeros | (self.moe_class.bias_zeros if attention.qkv_bias else {})
        if attention.is_hybrid:
            return hybrid_table(self.moe_class.ffn, zeros)
        if attention.norms_after:
            return norms_after_table(self.moe_class.ffn)
        table = llama_like_table(self.moe_class.ffn, attention.qkv_bias, attention.qk_norm, zeros)
        return table.with_dense_names(self.dense_names)

    def megatron_args(self, config: Any) -> dict[str, Any]:
        """Megatron's arguments for transformers' config of the dense or the MoE class; UserError if unsupported."""
        return megatron_args(config, self.attention, self.ffn_size)

    def written_as(self, moe_class: MoeClass) -> "Family":
        """The family with another MoE class than its default; see `MoeClass.misfit`."""
        return replace(self, moe_class=moe_class)

    def export_config(self, base: dict[str, Any], spec: ModelSpec, dtype: str) -> dict[str, Any]:
        """config.json of the export of a model `spec` whose base has the config.json `base`.

        Keys that transformers 5 renamed are written under both names, as other readers ignore the new names.
        """
        args, rope = spec.megatron_args, rope_parameters(spec)
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config = {
            **base,
            "architectures": [self.architecture if spec.moe is None else self.moe_class.architecture],
            "rope_theta": rope["rope_theta"],
            "rope_parameters": rope,
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "dtype": dtype,
            "torch_dtype": dtype,
            "vocab_size": args["vocab_size"],
            "tie_word_embeddings": not args["untie_embeddings_and_output_weights"],
        }
        if spec.moe is None:
            return config
        # A base that is an MoE has its class's keys. From transformers 5's layer_types, vLLM would conclude that a
        # GraniteMoe has attention sinks.
        for kind in MOE_CLASSES.values():
            for key in (*kind.config(spec, spec.moe), COPIES_KEY, "layer_types"):
                config.pop(key, None)
        ours: dict[str, Any] = {"model_type": self.moe_class.name, **_default_token_ids(base)}
        # Stock readers keep unknown keys: the experts that are original, for evaluation, and the equal ones among them.
        ours["num_original_experts"] = spec.moe.num_original_places
        if spec.moe.original_copies > 1:
            ours[COPIES_KEY] = spec.moe.original_copies
        return config | explicit_shape(spec) | self.moe_class.config(spec, spec.moe) | ours


LLAMA = Family("llama", "LlamaForCausalLM", "llama", MIXTRAL)
IQUEST = Family("iquestcoder", "IQuestCoderForCausalLM", "iquestcoder", MIXTRAL)
MISTRAL = Family("mistral", "MistralForCausalLM", MISTRAL_TYPE, MIXTRAL)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "qwen2", QWEN2_MOE, Attention(qkv_bias=True))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "qwen3", QWEN3_MOE, Attention(qk_norm=True))
GRANITE = Family("granite", "GraniteForCausalLM", "granite", GRANITE_MOE, Attention(multipliers=True))
ERNIE = Family("ernie4_5", "Ernie4_5ForCausalLM", "ernie4_5", ERNIE_MOE, Attention(interleaved_rope=True))
HELIUM = Family("helium", "HeliumForCausalLM", "helium", ERNIE_MOE, Attention(interleaved_rope=True))
PHI3 = Family(
    *("phi3", "Phi3ForCausalLM", PHI3_TYPE, MIXTRAL),
    dense_names={
        "model.layers.{i}.self_attn.q_proj.weight": "model.layers.{i}.self_attn.qkv_proj.weight[:{q}]",
        "model.layers.{i}.self_attn.k_proj.weight": "model.layers.{i}.self_attn.qkv_proj.weight[{q}:{qk}]",
        "model.layers.{i}.self_attn.v_proj.weight": "model.layers.{i}.self_attn.qkv_proj.weight[{qk}:]",
        "model.layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_up_proj.weight[:{ffn}]",
        "model.layers.{i}.mlp.up_proj.weight": "model.layers.{i}.mlp.gate_up_proj.weight[{ffn}:]",
    },
)
# Granite 4 without Mamba layers and experts; its FFN is the one next to the experts.
GRANITE_4 = Family(
    *("granite4", "GraniteMoeHybridForCausalLM", GRANITE_4_TYPE, GRANITE_MOE, Attention(multipliers=True)),
    dense_names={
        "model.layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.shared_mlp.input_linear.weight[:{ffn}]",
        "model.layers.{i}.mlp.up_proj.weight": "model.layers.{i}.shared_mlp.input_linear.weight[{ffn}:]",
        "model.layers.{i}.mlp.down_proj.weight": "model.layers.{i}.shared_mlp.output_linear.weight",
    },
    ffn_size="shared_intermediate_size",
)
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", "olmo2", FLEX_OLMO, Attention(qk_norm=True, norms_after=True))
SEED_OSS = Family("seed_oss", "SeedOssForCausalLM", "seed_oss", QWEN2_MOE, Attention(qkv_bias=True))
QWEN3_5 = Family("qwen3_5", "Qwen3_5ForCausalLM", "qwen3_5_text", QWEN3_5_MOE, Attention(is_hybrid=True, qk_norm=True))


def _default_token_ids(config: dict[str, Any]) -> dict[str, int | list[int] | None]:
    """The IDs that a config.json leaves to its class, whose defaults another class need not have."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    names = [name for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name not in config]
    if not names or kind not in CONFIG_MAPPING:
        return {}
    defaults = CONFIG_MAPPING[kind]()
    return {name: getattr(defaults, name, None) for name in names}


# --- lookup

# An MoE has the first family that its class holds.
_ORDERED = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_5, GRANITE, GRANITE_4, ERNIE, HELIUM, PHI3, SEED_OSS, OLMO2, IQUEST)
FAMILIES = {family.name: family for family in _ORDERED}


def family_of(config: dict[str, Any]) -> tuple[Family, bool]:
    """The family of a config.json, and whether it is an MoE, whose class the family then has; UserError if none fits.

    Families of one MoE class share their table; an MoE's is the first of them.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        has_its_type = not architectures and config.get("model_type") == family.model_type
        if has_its_type or family.architecture in architectures:
            return family, False
    for moe_class in MOE_CLASSES.values():
        if moe_class.architecture in architectures:
            has_bias = bool(config.get("attention_bias"))
            traits = {"qkv_bias": has_bias, "multipliers": not has_bias and has_multipliers(config)}
            attention = replace(moe_class.attention, **{trait: traits[trait] for trait in moe_class.optional})
            family = next(family for family in FAMILIES.values() if family.attention == attention)
            return family.written_as(moe_class), True
    name = ", ".join(map(str, architectures)) or config.get("model_type")
    known = [family.architecture for family in FAMILIES.values()]
    known += [*(moe_class.architecture for moe_class in MOE_CLASSES.values()), *TEXT_CLASSES]
    raise UserError(
        f"a {name} cannot be upcycled (docs/models.md#supported-models has more on some); pass a model of one of these "
        f"architectures: {', '.join(known)}"
    )


def family_named(name: str) -> Family:
    """The family that a model_spec.json names; UserError if there is none of this name."""
    if name not in FAMILIES:
        raise UserError(f"model family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


# --- models to upcycle


def read_base(folder: Path) -> tuple[Family, ModelSpec]:
    """Read the family and shape of a Hugging Face model from its config.json; UserError if it is unsupported.

    The experts of the spec are all original, and copies of each other as config.json says; its dtype is a placeholder,
    as only the weights have it.
    """
    raw = read_config(folder)
    if not raw.get("architectures") and not raw.get("model_type"):
        raise UserError(f"{folder}/config.json lacks architectures; restore it from the model's original config.json")
    family, is_moe = family_of(raw)
    for key in ("quantization_config", "quantization"):  # the keys of transformers and MLX
        if key in raw:
            raise UserError(f"{folder} is quantized ({key}); convert the unquantized model")
    if raw.get("per_layer_config"):
        raise UserError(f"{folder}/config.json has per_layer_config: layers of different shapes are unsupported")
    if "transformers_weights" in raw:
        raise UserError(
            f"{folder}/config.json names its weights in transformers_weights, which only transformers reads; rename "
            "that file to model.safetensors, and remove the key"
        )
    required = _REQUIRED + (family.moe_class.required if is_moe else ())
    if missing := [name for name in required if not raw.keys() & set(name.split(" or "))]:
        keys = ", ".join(missing)
        raise UserError(f"{folder}/config.json lacks {keys}; restore it from the model's original config.json")
    from transformers import AutoConfig

    try:
        config = transformers_config(folder)  # with the defaults of its class
        if config.get_text_config() is not config:  # a multimodal model
            config = AutoConfig.for_model(**raw)
    except Exception as error:  # a damaged config may raise any exception
        raise UserError(f"transformers cannot read {folder}/config.json: {' '.join(str(error).split())}") from error
    try:
        for name in ("rms_norm_eps", "initializer_range", "attention_dropout"):
            if not 0 <= (value := getattr(config, name, 0) or 0) < 1:  # NaN is in no range
                raise UserError(f"{name} must be at least 0 and below 1, got {value}")
        args = family.megatron_args(config)
        moe = _original_experts(config, family, args, raw) if is_moe else None
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{folder}/config.json has a value of the wrong type or size ({error}); restore it") from error
    return family, ModelSpec(family.name, "float32", args, moe)


def _original_experts(config: Any, family: Family, args: dict[str, Any], raw: dict[str, Any]) -> MoeSpec:
    """The experts of an MoE, all original; sets the FFN's size in `args`.

    UserError if config.json differs from what an export with these experts would contain.
    """
    dense = set(getattr(config, "mlp_only_layers", None) or [])
    layers = tuple(i for i in range(args["num_layers"]) if i not in dense)
    expert_ffn = getattr(config, "moe_intermediate_size", args["ffn_hidden_size"])
    if dense and expert_ffn != args["ffn_hidden_size"]:
        raise UserError(
            "FFNs of layers without experts must be as wide as the experts, "
            f"got widths {args['ffn_hidden_size']} and {expert_ffn}"
        )
    args["ffn_hidden_size"] = expert_ffn
    num_experts = next(getattr(config, name) for name in ("num_experts", "num_local_experts") if hasattr(config, name))
    if num_experts > MAX_EXPERTS:
        raise UserError(f"there must be at most {MAX_EXPERTS} experts, got {num_experts}; restore it")
    copies = raw.get(COPIES_KEY, 1)
    if type(copies) is not int or not 1 <= copies < max(num_experts, 2):
        raise UserError(f"{COPIES_KEY} must be an integer from 1 to {num_experts - 1}, got {copies!r}; remove it")
    moe = MoeSpec(0, config.num_experts_per_tok, layers, num_experts - copies + 1, copies)
    for name, expected in family.moe_class.config(ModelSpec(family.name, "float32", args), moe).items():
        value = getattr(config, name, raw.get(name, expected))
        is_close = isinstance(expected, float) and isinstance(value, int | float) and math.isclose(value, expected)
        if value != expected and not is_close and (value or expected):  # 0, [] and null are equivalent
            raise UserError(
                f"{name} must be {expected} to add experts to a {family.moe_class.architecture}, got {value}"
            )
    return moe


# Settings that do not change what weights compute.
FREE_ARGS = ("max_position_embeddings", "attention_dropout", "init_method_std")


def check_settings(
    a: Path, a_spec: ModelSpec, b: Path, b_spec: ModelSpec, remedy: str, free: tuple[str, ...] = ()
) -> None:
    """Check that two models have the same settings but `free` ones, experts left aside; UserError names the first."""
    for key in sorted(a_spec.megatron_args.keys() | b_spec.megatron_args.keys()):
        ours, theirs = (spec.megatron_args.get(key) for spec in (a_spec, b_spec))
        if key not in free and ours != theirs:
            raise UserError(f"{a} and {b} are different models: {key} is {ours} and {theirs}; {remedy}")
