"""The model families: for each its name table, its config.json, and the stock MoE class it leaves as.

To add one, write its entry and put it in FAMILIES; docs/design/families.md goes through an example.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moelpr.errors import UserError
from moelpr.families.hf_config import (
    explicit_shape,
    exported_config,
    llama_like_args,
    refuse_window_layers,
    sliding_window,
)
from moelpr.families.tables import HF_LAYER, Table, llama_like_table, moe_rows
from moelpr.model_spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """A dense architecture we can bring in and the stock MoE architecture it leaves as.

    megatron_args: transformers' config of either class → Megatron's arguments; UserError for what would be wrong.
    moe_config: the MoE class's own keys of config.json, from the spec. Read the other way round, what an MoE must say
        of itself to be brought in.
    may_mix_layers: the MoE class knows layers without experts.
    """

    name: str
    architecture: str
    model_type: str
    moe_architecture: str
    moe_model_type: str
    table: Table
    megatron_args: Callable[[Any], dict[str, Any]]
    moe_config: Callable[[ModelSpec], dict[str, Any]]
    may_mix_layers: bool

    def export_config(self, base: dict[str, Any], spec: ModelSpec, dtype: str) -> dict[str, Any]:
        """config.json of a model like `spec` that started from one with the config.json `base`."""
        if spec.moe is None:
            return exported_config(base, spec, self.architecture, dtype)
        config = exported_config(base, spec, self.moe_architecture, dtype)
        # The last key is ours: stock readers keep what they don't know, and evaluation asks for it.
        ours = {"model_type": self.moe_model_type, "num_original_experts": spec.moe.num_original_experts}
        return config | explicit_shape(spec) | self.moe_config(spec) | ours


# ------------------------------------------------------------------------------------------------ Llama, Mistral

# Softmax over all experts, top-k, renormalise: Mixtral's rule is the method's.
_MIXTRAL_TABLE = llama_like_table(
    moe_rows(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{j}.w1.weight",
        up="block_sparse_moe.experts.{j}.w3.weight",
        down="block_sparse_moe.experts.{j}.w2.weight",
    )
)


def _mixtral_config(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    return {
        "num_local_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.topk,
        "sliding_window": sliding_window(spec),
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    moe_architecture="MixtralForCausalLM",
    moe_model_type="mixtral",
    table=_MIXTRAL_TABLE,
    megatron_args=llama_like_args,
    moe_config=_mixtral_config,
    may_mix_layers=False,
)

MISTRAL = replace(LLAMA, name="mistral", architecture="MistralForCausalLM", model_type="mistral")

# --------------------------------------------------------------------------------------------------------- Qwen

_QWEN_MOE_ROWS = moe_rows(
    router="mlp.gate.weight",
    gate="mlp.experts.{j}.gate_proj.weight",
    up="mlp.experts.{j}.up_proj.weight",
    down="mlp.experts.{j}.down_proj.weight",
)


def _qwen_moe_config(spec: ModelSpec) -> dict[str, Any]:
    """What Qwen2Moe and Qwen3Moe share."""
    assert spec.moe is not None
    return {
        "num_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.topk,
        # The classes' default is false, which would be another model.
        "norm_topk_prob": True,
        "moe_intermediate_size": spec.megatron_args["ffn_hidden_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.megatron_args["num_layers"]) if not spec.is_moe_layer(i)],
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _qwen2_args(config: Any) -> dict[str, Any]:
    refuse_window_layers(config)
    return llama_like_args(config) | {"add_qkv_bias": True}


def _qwen2_moe_config(spec: ModelSpec) -> dict[str, Any]:
    return _qwen_moe_config(spec) | {"shared_expert_intermediate_size": 0, "qkv_bias": True}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    moe_architecture="Qwen2MoeForCausalLM",
    moe_model_type="qwen2_moe",
    table=llama_like_table(
        _QWEN_MOE_ROWS,
        qkv_bias=True,
        # Readers expect the shared expert's gate even where the shared expert has width 0.
        moe_zeros=((HF_LAYER + "mlp.shared_expert_gate.weight", "one hidden"),),
    ),
    megatron_args=_qwen2_args,
    moe_config=_qwen2_moe_config,
    may_mix_layers=True,
)


def _qwen3_args(config: Any) -> dict[str, Any]:
    refuse_window_layers(config)
    return llama_like_args(config) | {"qk_layernorm": True}


def _qwen3_moe_config(spec: ModelSpec) -> dict[str, Any]:
    # transformers 5 reads and writes num_local_experts, older readers know num_experts only.
    return _qwen_moe_config(spec) | {"num_local_experts": spec.moe.num_experts if spec.moe else 0}


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    moe_architecture="Qwen3MoeForCausalLM",
    moe_model_type="qwen3_moe",
    table=llama_like_table(_QWEN_MOE_ROWS, qk_norm=True),
    megatron_args=_qwen3_args,
    moe_config=_qwen3_moe_config,
    may_mix_layers=True,
)

# ------------------------------------------------------------------------------------------------------- lookup

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(config: dict[str, Any]) -> tuple[Family, bool]:
    """The family a config.json belongs to, and whether it is the MoE class. UserError with the known ones for others.

    Llama and Mistral share their MoE class, and their tables.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in architectures or (
            not architectures and config.get("model_type") == family.model_type
        ):
            return family, False
        if family.moe_architecture in architectures:
            return family, True
    found = ", ".join(architectures) or config.get("model_type") or "none"
    known = [family.architecture for family in FAMILIES.values()]
    moe = dict.fromkeys(family.moe_architecture for family in FAMILIES.values())
    raise UserError(
        f"found the architecture {found}; supported are {', '.join(known)} and, for a further round of languages, "
        f"{', '.join(moe)}"
    )


def family_named(name: str) -> Family:
    """The family a model_spec.json names."""
    if name not in FAMILIES:
        raise UserError(f"found the model family {name!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
