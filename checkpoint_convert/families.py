"""One name table per model family, read from left to right when importing and from right to left when exporting.

A row says which Megatron tensor is made of which Hugging Face tensors, by which transform, and what shapes those have.
`pieces` fills a table in for one model: every tensor once, in the order it's best streamed. To add a family, write its
rows (or reuse `llama_like_table`), its `megatron_args` and its entry in FAMILIES.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec

# ---------------------------------------------------------------------------------------------------- transforms


class Transform(Protocol):
    """How the HF tensors of a row become one Megatron tensor, and back; exact both ways."""

    def to_megatron(self, parts: list[Tensor], sizes: dict[str, int]) -> Tensor: ...

    def to_hf(self, tensor: Tensor, sizes: dict[str, int]) -> list[Tensor]: ...


class Identity:
    def to_megatron(self, parts: list[Tensor], sizes: dict[str, int]) -> Tensor:
        return parts[0]

    def to_hf(self, tensor: Tensor, sizes: dict[str, int]) -> list[Tensor]:
        return [tensor]


class Vocabulary:
    """One row per token id; Megatron may have padded the rows to a round number, HF must not see that."""

    def to_megatron(self, parts: list[Tensor], sizes: dict[str, int]) -> Tensor:
        return parts[0]

    def to_hf(self, tensor: Tensor, sizes: dict[str, int]) -> list[Tensor]:
        return [tensor[: sizes["vocab"]]]


class GateUp:
    """Megatron's linear_fc1 [2·ffn, hidden]: the gate's rows, then the up projection's."""

    def to_megatron(self, parts: list[Tensor], sizes: dict[str, int]) -> Tensor:
        return torch.cat(parts)

    def to_hf(self, tensor: Tensor, sizes: dict[str, int]) -> list[Tensor]:
        return list(tensor.chunk(2))


class QKV:
    """Megatron's linear_qkv (weight or bias): per query group its query heads, its key head, its value head."""

    def to_megatron(self, parts: list[Tensor], sizes: dict[str, int]) -> Tensor:
        rest = parts[0].shape[1:]
        grouped = [part.reshape(sizes["groups"], -1, *rest) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def to_hf(self, tensor: Tensor, sizes: dict[str, int]) -> list[Tensor]:
        rest = tensor.shape[1:]
        per_group = [sizes["q"] // sizes["groups"], sizes["head"], sizes["head"]]
        parts = tensor.reshape(sizes["groups"], -1, *rest).split(per_group, dim=1)
        return [part.reshape(-1, *rest) for part in parts]


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    """The words the tables' shapes are written in → their sizes in this model."""
    args = spec.megatron_args
    head, groups = args["kv_channels"], args["num_query_groups"]
    return {
        "vocab": args["vocab_size"],
        "hidden": args["hidden_size"],
        "ffn": args["ffn_hidden_size"],
        "head": head,
        "groups": groups,
        "q": args["num_attention_heads"] * head,
        "kv": groups * head,
        "experts": spec.moe.num_experts if spec.moe else 0,
        "one": 1,
    }


# -------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and what it's made of; {i} is the layer, {j} the expert (j ≥ 1: a slice of a stack).

    parts: (HF name, shape in the words of `sizes_of`) in the transform's order.
    origin: names the parts have in the dense model; None: the same names; (): not in a dense model.
    """

    megatron: str
    parts: tuple[tuple[str, str], ...]
    transform: Transform = field(default_factory=Identity)
    origin: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Table:
    """Rows for the model's ends, for every layer, and for a layer whose FFN is dense or an MoE."""

    before: tuple[Row, ...]
    layer: tuple[Row, ...]
    dense_ffn: tuple[Row, ...]
    moe_ffn: tuple[Row, ...]
    after: tuple[Row, ...]
    untied: tuple[Row, ...]
    # Tensors the stock MoE class wants and our model hasn't: (HF name, shape), written as zeros.
    moe_zeros: tuple[tuple[str, str], ...] = ()


HF_LAYER = "model.layers.{i}."
MEGATRON_LAYER = "decoder.layers.{i}."


def moe_rows(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Rows of an MoE layer's FFN from the stock MoE class's names; in `gate`, `up`, `down` {j} is the expert.

    An expert's origin is the dense FFN it was copied from.
    """
    mlp = MEGATRON_LAYER + "mlp."
    dense = [HF_LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    fc1 = ((HF_LAYER + gate, "ffn hidden"), (HF_LAYER + up, "ffn hidden"))
    fc2 = ((HF_LAYER + down, "hidden ffn"),)

    def of_expert_0(parts: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple((name.replace("{j}", "0"), shape) for name, shape in parts)

    norm = HF_LAYER + "post_attention_layernorm.weight"
    return (
        Row(MEGATRON_LAYER + "pre_mlp_layernorm.weight", ((norm, "hidden"),)),
        Row(mlp + "router.weight", ((HF_LAYER + router, "experts hidden"),), origin=()),
        Row(mlp + "original_expert.linear_fc1.weight", of_expert_0(fc1), GateUp(), (dense[0], dense[1])),
        Row(mlp + "experts.experts.linear_fc1.weight", fc1, GateUp(), (dense[0], dense[1])),
        Row(mlp + "original_expert.linear_fc2.weight", of_expert_0(fc2), origin=(dense[2],)),
        Row(mlp + "experts.experts.linear_fc2.weight", fc2, origin=(dense[2],)),
    )


def llama_like_table(
    moe_ffn: tuple[Row, ...],
    qkv_bias: bool = False,
    qk_norm: bool = False,
    moe_zeros: tuple[tuple[str, str], ...] = (),
) -> Table:
    """The table of every decoder with Llama's module names: grouped attention, RMSNorm before each part, SwiGLU."""
    hf, megatron = HF_LAYER + "self_attn.", MEGATRON_LAYER + "self_attention."
    mlp = MEGATRON_LAYER + "mlp."

    def qkv(suffix: str, columns: str) -> Row:
        parts = tuple(
            (f"{hf}{name}_proj.{suffix}", f"{rows}{columns}") for name, rows in (("q", "q"), ("k", "kv"), ("v", "kv"))
        )
        return Row(f"{megatron}linear_qkv.{suffix}", parts, QKV())

    layer = [
        Row(megatron + "linear_qkv.layer_norm_weight", ((HF_LAYER + "input_layernorm.weight", "hidden"),)),
        qkv("weight", " hidden"),
    ]
    if qkv_bias:
        layer.append(qkv("bias", ""))
    if qk_norm:
        layer.append(Row(megatron + "q_layernorm.weight", ((hf + "q_norm.weight", "head"),)))
        layer.append(Row(megatron + "k_layernorm.weight", ((hf + "k_norm.weight", "head"),)))
    layer.append(Row(megatron + "linear_proj.weight", ((hf + "o_proj.weight", "hidden q"),)))
    gate_up = tuple((HF_LAYER + f"mlp.{name}_proj.weight", "ffn hidden") for name in ("gate", "up"))
    return Table(
        before=(
            Row("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vocab hidden"),), Vocabulary()),
        ),
        layer=tuple(layer),
        dense_ffn=(
            Row(mlp + "linear_fc1.layer_norm_weight", ((HF_LAYER + "post_attention_layernorm.weight", "hidden"),)),
            Row(mlp + "linear_fc1.weight", gate_up, GateUp()),
            Row(mlp + "linear_fc2.weight", ((HF_LAYER + "mlp.down_proj.weight", "hidden ffn"),)),
        ),
        moe_ffn=moe_ffn,
        after=(Row("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),)),),
        untied=(Row("output_layer.weight", (("lm_head.weight", "vocab hidden"),), Vocabulary()),),
        moe_zeros=moe_zeros,
    )


@dataclass(frozen=True)
class Piece:
    """One row filled in for one layer and expert: a Megatron tensor (or slice `expert` of a stack) and its HF parts."""

    key: str
    stack_index: int | None
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    origin: tuple[str, ...]
    transform: Transform

    @property
    def expert(self) -> int:
        """The expert's number (0 for whatever belongs to no new expert)."""
        return 0 if self.stack_index is None else self.stack_index + 1


def pieces(table: Table, spec: ModelSpec) -> Iterator[Piece]:
    """Every tensor of the model `spec` describes, once; all slices of a stack follow each other."""
    sizes = sizes_of(spec)
    is_untied = spec.megatron_args["untie_embeddings_and_output_weights"]
    for row in table.before:
        yield _fill(row, sizes)
    for i in range(spec.megatron_args["num_layers"]):
        for row in (*table.layer, *(table.moe_ffn if spec.is_moe_layer(i) else table.dense_ffn)):
            if any("{j}" in name for name, _ in row.parts):
                assert spec.moe is not None
                for j in range(1, spec.moe.num_experts):
                    yield _fill(row, sizes, i, j)
            else:
                yield _fill(row, sizes, i)
    for row in (*table.after, *(table.untied if is_untied else ())):
        yield _fill(row, sizes)


def zeros(table: Table, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """HF names and shapes of the zero tensors the stock MoE class of `spec` wants."""
    sizes = sizes_of(spec)
    for i in spec.moe.layers if spec.moe else ():
        for name, shape in table.moe_zeros:
            yield name.format(i=i), _shape(shape, sizes)


def megatron_shape(piece: Piece, spec: ModelSpec) -> tuple[int, ...]:
    """Shape of the whole Megatron tensor `piece` (or its stack) belongs to."""
    rows = sum(shape[0] for shape in piece.hf_shapes)
    shape = (rows, *piece.hf_shapes[0][1:])
    if piece.stack_index is None:
        return shape
    assert spec.moe is not None
    return (spec.moe.num_new_experts, *shape)


def frozen_name(table: Table, name: str) -> str | None:
    """The dense tensor that `name` of the upcycled model must still equal after training; None for what is trained."""
    for row in table.moe_ffn:
        for part, (pattern, _) in enumerate(row.parts):
            match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)").replace(r"\{j\}", r"[1-9]\d*"), name)
            if match is not None:
                if row.origin is None:
                    return name
                return row.origin[part].format(i=match[1]) if row.origin and "{j}" not in pattern else None
    return name


def _fill(row: Row, sizes: dict[str, int], i: int | None = None, j: int | None = None) -> Piece:
    names = tuple(name.format(i=i, j=j) for name, _ in row.parts)
    origin = names if row.origin is None else tuple(name.format(i=i) for name in row.origin)
    return Piece(
        key=row.megatron.format(i=i),
        stack_index=None if j is None else j - 1,
        hf_names=names,
        hf_shapes=tuple(_shape(shape, sizes) for _, shape in row.parts),
        origin=origin,
        transform=row.transform,
    )


def _shape(words: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[word] for word in words.split())


# ------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True)
class Family:
    """A dense architecture we can bring in and the stock MoE architecture it leaves as.

    megatron_args: transformers' config object → Megatron's arguments; UserError for what Megatron would get wrong.
    moe_config: keys of the MoE class's config.json that the dense one hasn't, from the exported model's spec.
    """

    name: str
    architecture: str
    moe_architecture: str
    moe_model_type: str
    table: Table
    megatron_args: Callable[[Any], dict[str, Any]]
    moe_config: Callable[[ModelSpec], dict[str, Any]]


def _common_args(config: Any) -> dict[str, Any]:
    """What all supported families share. `config` is a transformers config, so its class's defaults are filled in."""
    if config.hidden_act != "silu":
        raise UserError(f"found hidden_act {config.hidden_act!r}; only 'silu' (SwiGLU) is supported")
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UserError(f"found RoPE scaling {kind!r}; only plain RoPE (rope_type 'default') is supported so far")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("found a partial_rotary_factor other than 1; only full rotary embeddings are supported")
    theta = rope["rope_theta"]
    if theta != int(theta):
        raise UserError(f"found rope_theta {theta}; Megatron takes whole numbers only")
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
        "rotary_base": int(theta),
        "rotary_percent": 1.0,
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


def _qwen2_args(config: Any) -> dict[str, Any]:
    if config.use_sliding_window:
        raise UserError("found use_sliding_window: true; Qwen2 models with sliding-window layers can't be converted")
    return _common_args(config) | {"add_qkv_bias": True}


def _qwen2_moe_config(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    num_layers = spec.megatron_args["num_layers"]
    return {
        "num_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.topk,
        # The class's default is false, which would be another model.
        "norm_topk_prob": True,
        "moe_intermediate_size": spec.megatron_args["ffn_hidden_size"],
        "shared_expert_intermediate_size": 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(num_layers) if not spec.is_moe_layer(i)],
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": None,
    }


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    moe_architecture="Qwen2MoeForCausalLM",
    moe_model_type="qwen2_moe",
    table=llama_like_table(
        moe_rows(
            router="mlp.gate.weight",
            gate="mlp.experts.{j}.gate_proj.weight",
            up="mlp.experts.{j}.up_proj.weight",
            down="mlp.experts.{j}.down_proj.weight",
        ),
        qkv_bias=True,
        # Readers expect the shared expert's gate even where the shared expert has width 0.
        moe_zeros=((HF_LAYER + "mlp.shared_expert_gate.weight", "one hidden"),),
    ),
    megatron_args=_qwen2_args,
    moe_config=_qwen2_moe_config,
)

FAMILIES = {family.name: family for family in (QWEN2,)}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json; UserError that names the found and the known ones when there is none."""
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in architectures or (not architectures and config.get("model_type") == family.name):
            return family
    found = ", ".join(architectures) or config.get("model_type") or "none"
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise UserError(f"found the architecture {found}; supported are {known}")


def moe_family_of(config: dict[str, Any]) -> Family:
    """The family whose stock MoE class a config.json names."""
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.moe_architecture in architectures:
            return family
    known = ", ".join(family.moe_architecture for family in FAMILIES.values())
    raise UserError(f"found the architecture {', '.join(architectures) or 'none'}; the upcycled ones are {known}")


def family_named(name: str) -> Family:
    """The family a model_spec.json names."""
    if name not in FAMILIES:
        raise UserError(f"found the model family {name!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
