"""Name tables: which Megatron tensor is made of which Hugging Face tensors, by which transform and of what shapes.

A table is read from left to right when importing and from right to left when exporting. `pieces` fills it in for one
model: every tensor once, in the order it's best streamed. The families' own tables are in families.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

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

# What a tensor is to the method: routers and new experts are trained, the rest is frozen.
Role = Literal["shared", "original expert", "new expert", "router"]


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and what it's made of; {i} is the layer, {j} the expert.

    parts: (HF name, shape in the words of `sizes_of`) in the transform's order.
    role: of an expert there is a row for all: {j} runs over the original or over the new ones, which are slices of one
        stack.
    dense: an expert's names in a dense model, where it is the FFN.
    """

    megatron: str
    parts: tuple[tuple[str, str], ...]
    transform: Transform = field(default_factory=Identity)
    role: Role = "shared"
    dense: tuple[str, ...] = ()


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
ORIGINAL_EXPERT = "original_experts.{j}."
NEW_EXPERTS = "experts.experts."


def moe_rows(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Rows of an MoE layer's FFN from the stock MoE class's names; in `gate`, `up`, `down` {j} is the expert."""
    mlp = MEGATRON_LAYER + "mlp."
    dense_gate, dense_up, dense_down = (HF_LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    fc1 = ((HF_LAYER + gate, "ffn hidden"), (HF_LAYER + up, "ffn hidden"))
    fc2 = ((HF_LAYER + down, "hidden ffn"),)
    norm = HF_LAYER + "post_attention_layernorm.weight"
    # A copy follows what it is copied from, so that it is read once for all.
    return (
        Row(MEGATRON_LAYER + "pre_mlp_layernorm.weight", ((norm, "hidden"),)),
        Row(mlp + "router.weight", ((HF_LAYER + router, "experts hidden"),), role="router"),
        Row(mlp + ORIGINAL_EXPERT + "linear_fc1.weight", fc1, GateUp(), "original expert", (dense_gate, dense_up)),
        Row(mlp + NEW_EXPERTS + "linear_fc1.weight", fc1, GateUp(), "new expert", (dense_gate, dense_up)),
        Row(mlp + ORIGINAL_EXPERT + "linear_fc2.weight", fc2, Identity(), "original expert", (dense_down,)),
        Row(mlp + NEW_EXPERTS + "linear_fc2.weight", fc2, Identity(), "new expert", (dense_down,)),
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


# -------------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Piece:
    """One row filled in for one layer and expert: a Megatron tensor (or slice `stack_index` of a stack) and its parts.

    expert: the expert's number in the HF class; None for what belongs to no expert.
    origin: HF names of what it starts from in the model it is upcycled from: itself where it is frozen, expert 0 where
        it is a new expert, the router of the experts that were there; () for the router of a dense model's layer.
    """

    key: str
    stack_index: int | None
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    transform: Transform
    role: Role
    expert: int | None
    origin: tuple[str, ...]

    @property
    def is_trained(self) -> bool:
        return self.role in ("router", "new expert")


def pieces(table: Table, spec: ModelSpec) -> Iterator[Piece]:
    """Every tensor of the model `spec` describes, once; all slices of a stack follow each other."""
    sizes = sizes_of(spec)
    is_untied = spec.megatron_args["untie_embeddings_and_output_weights"]
    for row in table.before:
        yield from _filled(row, spec, sizes)
    for i in range(spec.megatron_args["num_layers"]):
        for row in (*table.layer, *(table.moe_ffn if spec.is_moe_layer(i) else table.dense_ffn)):
            yield from _filled(row, spec, sizes, i)
    for row in (*table.after, *(table.untied if is_untied else ())):
        yield from _filled(row, spec, sizes)


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


def frozen_name(table: Table, name: str, num_original: int = 1) -> str | None:
    """The base's tensor that `name` of the upcycled model must still equal after training; None for what is trained.

    num_original: 1 where the base is dense, else the base's experts.
    """
    for row in table.moe_ffn:
        for part, (pattern, _) in enumerate(row.parts):
            match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)").replace(r"\{j\}", r"(\d+)"), name)
            if match is None or row.role == "shared":
                continue
            if row.role == "router" or int(match[2]) >= num_original:
                return None
            return name if num_original > 1 else row.dense[part].format(i=match[1])
    return name


def _filled(row: Row, spec: ModelSpec, sizes: dict[str, int], i: int | None = None) -> Iterator[Piece]:
    """The row for layer `i` (None: for an end of the model), for each of its experts."""
    moe = spec.moe
    if moe is None or row.role in ("shared", "router"):
        base_has_router = moe is not None and moe.num_original_experts > 1
        names = tuple(name.format(i=i) for name, _ in row.parts)
        origin = names if row.role == "shared" or base_has_router else ()
        yield _piece(row, sizes, row.megatron.format(i=i), names, origin)
        return
    is_new = row.role == "new expert"
    for j in range(moe.num_original_experts, moe.num_experts) if is_new else range(moe.num_original_experts):
        if moe.num_original_experts == 1:
            origin = tuple(name.format(i=i) for name in row.dense)
        else:
            origin = tuple(name.format(i=i, j=0 if is_new else j) for name, _ in row.parts)
        names = tuple(name.format(i=i, j=j) for name, _ in row.parts)
        stack_index = j - moe.num_original_experts if is_new else None
        yield _piece(row, sizes, row.megatron.format(i=i, j=j), names, origin, stack_index, expert=j)


def _piece(
    row: Row,
    sizes: dict[str, int],
    key: str,
    hf_names: tuple[str, ...],
    origin: tuple[str, ...],
    stack_index: int | None = None,
    expert: int | None = None,
) -> Piece:
    hf_shapes = tuple(_shape(shape, sizes) for _, shape in row.parts)
    return Piece(key, stack_index, hf_names, hf_shapes, row.transform, row.role, expert, origin)


def _shape(words: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[word] for word in words.split())
