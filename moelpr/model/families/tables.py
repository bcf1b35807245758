"""Name tables: which Megatron tensor consists of which Hugging Face tensors, with the transform and the shapes.

A table is read from left to right for import and from right to left for export. `pieces` expands it for one model:
every tensor once, in the best order for streaming. The tables of the families are in families.py, the rows of the MoE
classes in moe_classes.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Part, part_of, trained_parts

if TYPE_CHECKING:
    from torch import Tensor

# --- transforms


class Transform:
    """Maps the HF tensors of a row to one Megatron tensor and back, exactly in both directions; here, unchanged."""

    def to_megatron(self, parts: "list[Tensor]", sizes: dict[str, int]) -> "Tensor":
        return parts[0]

    def to_hf(self, tensor: "Tensor", sizes: dict[str, int]) -> "list[Tensor]":
        return [tensor]


class GateUp(Transform):
    """Megatron's linear_fc1 [2·ffn, hidden]: the rows of the gate, then of the up projection."""

    def to_megatron(self, parts: "list[Tensor]", sizes: dict[str, int]) -> "Tensor":
        import torch  # the command lines that only name families should not wait for it

        return torch.cat(parts)

    def to_hf(self, tensor: "Tensor", sizes: dict[str, int]) -> "list[Tensor]":
        return list(tensor.chunk(2))


class QKV(Transform):
    """Megatron's linear_qkv (weight or bias): per query group its query heads, key head and value head."""

    queries = "q"  # the name of their size

    def to_megatron(self, parts: "list[Tensor]", sizes: dict[str, int]) -> "Tensor":
        import torch

        rest = parts[0].shape[1:]
        return torch.cat([part.reshape(sizes["groups"], -1, *rest) for part in parts], dim=1).reshape(-1, *rest)

    def to_hf(self, tensor: "Tensor", sizes: dict[str, int]) -> "list[Tensor]":
        rest = tensor.shape[1:]
        per_group = [sizes[self.queries] // sizes["groups"], sizes["head"], sizes["head"]]
        parts = tensor.reshape(sizes["groups"], -1, *rest).split(per_group, dim=1)
        return [part.reshape(-1, *rest) for part in parts]


class GatedQKV(QKV):
    """The same with a gate on attention's output: per query group its query heads, their gates, key and value head.

    In Hugging Face's q_proj, the gate of each head follows its query.
    """

    queries = "gated_q"

    def to_megatron(self, parts: "list[Tensor]", sizes: dict[str, int]) -> "Tensor":
        queries, *rest = parts
        queries = queries.unflatten(0, (sizes["groups"], -1, 2, sizes["head"])).transpose(1, 2).flatten(0, 3)
        return super().to_megatron([queries, *rest], sizes)

    def to_hf(self, tensor: "Tensor", sizes: dict[str, int]) -> "list[Tensor]":
        queries, *rest = super().to_hf(tensor, sizes)
        queries = queries.unflatten(0, (sizes["groups"], 2, -1, sizes["head"])).transpose(1, 2).flatten(0, 3)
        return [queries, *rest]


# The width of a shared expert that a class requires and that adds zero to the output: the least that quantization in
# blocks of 32 and a division over 32 ranks allow.
SHARED_EXPERT = 32


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    """Name of a dimension in the tables' shapes → its size in this model."""
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
        "qk": (args["num_attention_heads"] + groups) * head,
        "experts": spec.moe.num_experts if spec.moe else 0,
        "one": 1,
        "shared": SHARED_EXPERT,
        **_hybrid_sizes(args),
    }


def _hybrid_sizes(args: dict[str, Any]) -> dict[str, int]:
    """The sizes of a hybrid model's linear attention; linear_k2 is where the values' rows begin."""
    if "linear_attention_freq" not in args:
        return {}
    keys = args["linear_num_key_heads"] * args["linear_key_head_dim"]
    return {
        "gated_q": 2 * args["num_attention_heads"] * args["kv_channels"],
        "linear_k": keys,
        "linear_k2": 2 * keys,
        "linear_v": args["linear_num_value_heads"] * args["linear_value_head_dim"],
        "linear_heads": args["linear_num_value_heads"],
        "linear_head": args["linear_value_head_dim"],
        "conv": args["linear_conv_kernel_dim"],
    }


# --- tables

# Tensors that stage 1 trains; all others equal the base's.
_TRAINED = trained_parts("stage1")


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and its parts; {i} is the layer, {j} the expert, {ffn} and others a size of `sizes_of`."""

    megatron: str  # Megatron's name. A row with new experts covers all of them: they are slices of one stack.
    parts: dict[str, str]  # HF name → shape in the names of `sizes_of`, in the order of the transform
    transform: Transform = field(default_factory=Transform)  # maps the parts to the tensor and back
    dense: tuple[str, ...] = ()  # HF names of the parts in a dense model, if they differ: there, an expert is the FFN

    @property
    def part(self) -> Part:
        return part_of(self.megatron)


@dataclass(frozen=True)
class NameTable:
    """Rows of the tensors around the layers, of every layer, and of a layer's dense or MoE FFN."""

    before: tuple[Row, ...]
    layer: tuple[Row, ...]
    dense_ffn: tuple[Row, ...]
    moe_ffn: tuple[Row, ...]
    after: tuple[Row, ...]
    untied: tuple[Row, ...]  # rows of an output layer that does not share the embedding's weights
    moe_zeros: dict[str, str]  # HF name → shape of tensors that only the stock MoE class has; they are written as zeros
    linear: tuple[Row, ...] = ()  # rows of a layer with linear attention, in place of `layer`

    def with_dense_names(self, renamed: Mapping[str, str]) -> "NameTable":
        """The table of a dense class with other names for some tensors, and the same MoE class."""

        def named(row: Row) -> Row:
            return replace(row, dense=tuple(renamed.get(name, name) for name in row.dense or row.parts))

        layer, dense_ffn, moe_ffn = (tuple(map(named, rows)) for rows in (self.layer, self.dense_ffn, self.moe_ffn))
        return replace(self, layer=layer, dense_ffn=dense_ffn, moe_ffn=moe_ffn) if renamed else self


# A class may join matrices, or stack its experts, in one HF tensor, whose parts are then named like slices of NumPy:
# with gates and up projections of 768 rows, "NAME[:768]" is the gate, "NAME[3,:768]" that of expert 3, "NAME[3,768:]"
# its up projection. In a table, the parts follow one another, so that they can be streamed into a file.
_PART_OF_STACK = re.compile(r"(.+)\[(?:(\d+)(?:,(\d*):(\d*))?|(\d*):(\d*))\]")


def stacked_part(name: str) -> tuple[str, tuple[Any, ...]]:
    """The HF tensor that `name` is in, and its index there; () for a complete tensor."""
    if (match := _PART_OF_STACK.fullmatch(name)) is None:
        return name, ()
    stack, expert, first, end, *edges = match.groups()

    def rows(*texts: str) -> slice:
        return slice(*(int(text) if text else None for text in texts))

    if expert is None:
        return stack, (rows(*edges),)
    return stack, (int(expert),) if first is None else (int(expert), rows(first, end))


_NORM = {"model.layers.{i}.post_attention_layernorm.weight": "hidden"}
_GATE, _UP, _DOWN = (
    "model.layers.{i}.mlp.gate_proj.weight",
    "model.layers.{i}.mlp.up_proj.weight",
    "model.layers.{i}.mlp.down_proj.weight",
)


_NORM_AFTER = Row(
    "decoder.layers.{i}.mlp_bda.layernorm.weight", {"model.layers.{i}.post_feedforward_layernorm.weight": "hidden"}
)


def moe_rows(router: str, gate: str, up: str, down: str, *, norm_after: bool = False) -> tuple[Row, ...]:
    """Rows of an MoE layer's FFN, from the stock class's names of the router's weight and an expert's projections."""
    gate_up = {gate: "ffn hidden", up: "ffn hidden"}
    return (
        _NORM_AFTER if norm_after else Row("decoder.layers.{i}.pre_mlp_layernorm.weight", _NORM),
        Row("decoder.layers.{i}.mlp.router.weight", {router: "experts hidden"}),
        # Copies follow their origin, so that it is read only once.
        Row("decoder.layers.{i}.mlp.original_experts.{j}.linear_fc1.weight", gate_up, GateUp(), (_GATE, _UP)),
        Row("decoder.layers.{i}.mlp.experts.experts.linear_fc1.weight", gate_up, GateUp(), (_GATE, _UP)),
        Row("decoder.layers.{i}.mlp.original_experts.{j}.linear_fc2.weight", {down: "hidden ffn"}, dense=(_DOWN,)),
        Row("decoder.layers.{i}.mlp.experts.experts.linear_fc2.weight", {down: "hidden ffn"}, dense=(_DOWN,)),
    )


def _qkv(kind: str, *shapes: str, transform: Transform) -> Row:
    """The weights or the biases of queries, keys and values."""
    names = (f"model.layers.{{i}}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
    return Row(
        f"decoder.layers.{{i}}.self_attention.linear_qkv.{kind}", dict(zip(names, shapes, strict=True)), transform
    )


_QKV_WEIGHT = _qkv("weight", "q hidden", "kv hidden", "kv hidden", transform=QKV())
_QKV_BIAS = _qkv("bias", "q", "kv", "kv", transform=QKV())
_GATED_QKV = _qkv("weight", "gated_q hidden", "kv hidden", "kv hidden", transform=GatedQKV())
_QK_NORMS = (
    Row("decoder.layers.{i}.self_attention.q_layernorm.weight", {"model.layers.{i}.self_attn.q_norm.weight": "head"}),
    Row("decoder.layers.{i}.self_attention.k_layernorm.weight", {"model.layers.{i}.self_attn.k_norm.weight": "head"}),
)


def llama_like_table(moe_ffn: tuple[Row, ...], qkv_bias: bool, qk_norm: bool, moe_zeros: dict[str, str]) -> NameTable:
    """The table of a decoder with Llama's module names: grouped-query attention, pre-RMSNorm, SwiGLU."""
    input_norm = {"model.layers.{i}.input_layernorm.weight": "hidden"}
    output = {"model.layers.{i}.self_attn.o_proj.weight": "hidden q"}
    return NameTable(
        before=(Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"}),),
        layer=(
            Row("decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight", input_norm),
            _QKV_WEIGHT,
            *([_QKV_BIAS] if qkv_bias else []),
            *(_QK_NORMS if qk_norm else []),
            Row("decoder.layers.{i}.self_attention.linear_proj.weight", output),
        ),
        dense_ffn=(
            Row("decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight", _NORM),
            Row("decoder.layers.{i}.mlp.linear_fc1.weight", {_GATE: "ffn hidden", _UP: "ffn hidden"}, GateUp()),
            Row("decoder.layers.{i}.mlp.linear_fc2.weight", {_DOWN: "hidden ffn"}),
        ),
        moe_ffn=moe_ffn,
        after=(Row("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),),
        untied=(Row("output_layer.weight", {"lm_head.weight": "vocab hidden"}),),
        moe_zeros=moe_zeros,
    )


def norms_after_table(moe_ffn: tuple[Row, ...]) -> NameTable:
    """The table of OLMo 2: Llama's, with the norms after attention and FFN, and of queries and keys over all heads."""
    table, attention = llama_like_table(moe_ffn, False, True, {}), "decoder.layers.{i}.self_attention."
    norms = (
        Row("decoder.layers.{i}.self_attn_bda.layernorm.weight", _NORM),
        Row(f"{attention}q_layernorm.weight", {"model.layers.{i}.self_attn.q_norm.weight": "q"}),
        Row(f"{attention}k_layernorm.weight", {"model.layers.{i}.self_attn.k_norm.weight": "kv"}),
    )
    others = (row for row in table.layer if "norm" not in row.megatron)
    return replace(table, layer=(*others, *norms), dense_ffn=(_NORM_AFTER, *table.dense_ffn[1:]))


def hybrid_table(moe_ffn: tuple[Row, ...], moe_zeros: dict[str, str]) -> NameTable:
    """The table of a decoder some of whose layers have a Gated DeltaNet, the others gated attention with norms."""
    table = llama_like_table(moe_ffn, qkv_bias=False, qk_norm=True, moe_zeros=moe_zeros)
    layer = tuple(_GATED_QKV if row is _QKV_WEIGHT else row for row in table.layer)
    ours, theirs = "decoder.layers.{i}.self_attention.", "model.layers.{i}.linear_attn."
    parts = {"query": "[:{linear_k}]", "key": "[{linear_k}:{linear_k2}]", "value": "[{linear_k2}:]"}
    widths = {"query": "linear_k", "key": "linear_k", "value": "linear_v"}
    tensors = {
        **{f"in_proj.weight.{x}": (f"in_proj_qkv.weight{parts[x]}", f"{widths[x]} hidden") for x in parts},
        "in_proj.weight.z": ("in_proj_z.weight", "linear_v hidden"),
        "in_proj.weight.beta": ("in_proj_b.weight", "linear_heads hidden"),
        "in_proj.weight.alpha": ("in_proj_a.weight", "linear_heads hidden"),
        **{f"conv1d.weight.{x}": (f"conv1d.weight{parts[x]}", f"{widths[x]} one conv") for x in parts},
        "A_log": ("A_log", "linear_heads"),
        "dt_bias": ("dt_bias", "linear_heads"),
        "out_norm.weight": ("norm.weight", "linear_head"),
        "out_proj.weight": ("out_proj.weight", "hidden linear_v"),
    }
    input_norm = Row(ours + "in_proj.layer_norm_weight", table.layer[0].parts)
    rows = (Row(ours + key, {theirs + name: shape}) for key, (name, shape) in tensors.items())
    return replace(table, layer=layer, linear=(input_norm, *rows))


# --- pieces


@dataclass(frozen=True)
class Piece:
    """A row expanded for one layer and expert: a Megatron tensor, or a slice of a stack, and its HF parts."""

    key: str  # name of the tensor in the checkpoint
    stack_index: int | None  # index of the slice; None for a complete tensor
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    transform: Transform
    expert: int | None  # the expert's number in the HF class; None outside experts
    # HF names of the source tensors in the model that is upcycled: its own if frozen, those of expert 0 for a new
    # expert, those of the previous router for a router; () for the router of a dense model's layer.
    origin: tuple[str, ...]
    # HF names of the parts in the other places of the dense FFN, one tuple per place.
    copies: tuple[tuple[str, ...], ...] = ()

    @property
    def part(self) -> Part:
        return part_of(self.key)

    @property
    def places(self) -> tuple[tuple[str, ...], ...]:
        """HF names of the parts in every place that has them; the first is `hf_names`."""
        return self.hf_names, *self.copies

    @property
    def is_trained(self) -> bool:
        """Whether training may make it differ from its origin: routers and new experts."""
        return self.part in _TRAINED


def pieces(table: NameTable, spec: ModelSpec) -> Iterator[Piece]:
    """Every tensor of the model that `spec` describes, once; the slices of a stack are consecutive."""
    sizes = sizes_of(spec)
    is_untied = spec.megatron_args["untie_embeddings_and_output_weights"]
    for row in table.before:
        yield from _expanded(row, spec, sizes)
    for i in range(spec.megatron_args["num_layers"]):
        attention = table.linear if spec.is_linear_layer(i) else table.layer
        for row in (*attention, *(table.moe_ffn if spec.is_moe_layer(i) else table.dense_ffn)):
            yield from _expanded(row, spec, sizes, i)
    for row in (*table.after, *(table.untied if is_untied else ())):
        yield from _expanded(row, spec, sizes)


def zeros(table: NameTable, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """HF names and shapes of the zero tensors that the stock MoE class of `spec` requires."""
    sizes = sizes_of(spec)
    for i in spec.moe.layers if spec.moe else ():
        for name, shape in table.moe_zeros.items():
            yield name.format(i=i), _shape(shape, sizes)


def megatron_shape(piece: Piece, spec: ModelSpec) -> tuple[int, ...]:
    """Shape of the Megatron tensor of `piece`; of the complete stack if it is a slice."""
    rows = sum(shape[0] for shape in piece.hf_shapes)
    shape = (rows, *piece.hf_shapes[0][1:])
    if piece.stack_index is None:
        return shape
    assert spec.moe is not None
    return (spec.moe.num_new_experts, *shape)


def _expanded(row: Row, spec: ModelSpec, sizes: dict[str, int], i: int | None = None) -> Iterator[Piece]:
    """The row for layer `i` (None: outside the layers) and for each of its experts."""
    moe = spec.moe
    shapes = tuple(_shape(shape, sizes) for shape in row.parts.values())
    if moe is None or row.part not in (Part.ORIGINAL_EXPERTS, Part.NEW_EXPERTS):
        names, origin = (tuple(n.format(i=i, **sizes) for n in kind) for kind in (row.parts, row.dense or row.parts))
        if moe is None:
            names = origin
        elif moe.num_original_experts > 1:
            origin = names
        elif row.part is Part.ROUTER:
            origin = ()
        yield Piece(row.megatron.format(i=i), None, names, shapes, row.transform, None, origin)
        return
    is_new = row.part is Part.NEW_EXPERTS
    first_place = moe.num_original_places if is_new else moe.original_copies - 1
    for j in range(moe.num_new_experts if is_new else moe.num_original_experts):
        places = range(moe.original_copies) if j == 0 and not is_new else [first_place + j]
        names, *copies = (tuple(name.format(i=i, j=place, **sizes) for name in row.parts) for place in places)
        if moe.num_original_experts == 1:
            origin = tuple(name.format(i=i, **sizes) for name in row.dense)
        else:
            first = 0 if is_new else places[0]
            origin = tuple(name.format(i=i, j=first, **sizes) for name in row.parts)
        key, stack_index = row.megatron.format(i=i, j=j), j if is_new else None
        yield Piece(key, stack_index, names, shapes, row.transform, places[0], origin, tuple(copies))


def _shape(names: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[name] for name in names.split())
