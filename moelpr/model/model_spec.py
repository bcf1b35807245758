"""`model_spec.json`: the model in a Megatron checkpoint folder, so that its shape need not be repeated as flags.

The converter writes it next to the weights, the trainer copies it to its `--save` folder, the exporter reads it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self, TypedDict

from pydantic import Field, with_config
from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record

FILE_NAME = "model_spec.json"
DTYPES = ("float32", "bfloat16", "float16")
# Published models have at most a few hundred. A damaged number would be built, layer for layer, until memory is full.
MAX_LAYERS, MAX_EXPERTS = 10_000, 4096

_Size = Annotated[int, Field(ge=1, lt=1 << 31)]
_Multiplier = Annotated[float, Field(gt=0, le=1e6)]
_Fraction = Annotated[float, Field(ge=0, le=1)]


@with_config(STRICT)
class MegatronArgs(TypedDict):
    """The shape of a model, as values of Megatron's flags."""

    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    hidden_size: _Size
    ffn_hidden_size: _Size
    num_attention_heads: _Size
    num_query_groups: _Size
    kv_channels: _Size
    max_position_embeddings: _Size
    rotary_base: _Size
    vocab_size: _Size
    group_query_attention: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    untie_embeddings_and_output_weights: bool
    norm_epsilon: Annotated[float, Field(gt=0, lt=1)]
    attention_dropout: _Fraction
    hidden_dropout: _Fraction
    init_method_std: Annotated[float, Field(ge=0, le=100)]
    rotary_percent: Annotated[float, Field(gt=0, le=1)]
    window_size: NotRequired[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]]
    use_rope_scaling: NotRequired[bool]
    rope_scaling_factor: NotRequired[Annotated[float, Field(ge=1e-3, le=1e6)]]
    rotary_interleaved: NotRequired[bool]
    norms_after: NotRequired[bool]
    # Granite's multipliers, all or none.
    softmax_scale: NotRequired[_Multiplier]
    residual_multiplier: NotRequired[_Multiplier]
    use_mup: NotRequired[bool]
    mup_embedding_mult: NotRequired[_Multiplier]
    mup_output_mult: NotRequired[_Multiplier]
    # Hybrid models: 1 for each layer whose attention is linear, 0 for the others; heads and widths of the former; and
    # attention with a gate on its output, and norms that scale by 1 plus their weight.
    experimental_attention_variant: NotRequired[Literal["gated_delta_net"]]
    linear_attention_freq: NotRequired[list[Literal[0, 1]]]
    linear_num_key_heads: NotRequired[_Size]
    linear_num_value_heads: NotRequired[_Size]
    linear_key_head_dim: NotRequired[_Size]
    linear_value_head_dim: NotRequired[_Size]
    linear_conv_kernel_dim: NotRequired[_Size]
    attention_output_gate: NotRequired[Literal[True]]
    apply_layernorm_1p: NotRequired[Literal[True]]
    # The layers of every family have these.
    normalization: Literal["RMSNorm"]
    swiglu: Literal[True]
    add_bias_linear: Literal[False]
    position_embedding_type: Literal["rope"]


@dataclass(frozen=True, config=STRICT)
class MoeSpec:
    """The MoE layers of a model, and their experts.

    Attributes:
        num_new_experts: N, the experts of this round.
        topk: K, experts per token; with 1, every gate weight is 1, so routers cannot be trained.
        layers: 0-based numbers of the MoE layers, ascending; the others stay dense.
        num_original_experts: m, the experts from before this round, which don't change: the dense FFN, then those of
            earlier rounds in order.
        original_copies: C, the places of the dense FFN: the router has C rows for it, and an export C equal experts.
    """

    num_new_experts: int
    topk: int
    layers: tuple[int, ...]
    num_original_experts: int = 1
    original_copies: int = 1

    @property
    def num_original_places(self) -> int:
        """P = C + m - 1: places 0 to C - 1 are the dense FFN, C to P - 1 the other original experts."""
        return self.original_copies + self.num_original_experts - 1

    @property
    def num_experts(self) -> int:
        """E = P + N, the places of an MoE layer."""
        return self.num_original_places + self.num_new_experts

    def check(self, num_layers: int) -> None:
        """Raise a UserError if a model of `num_layers` layers can't have these experts."""
        for name, number, most in (
            ("--num-new-experts", self.num_new_experts, 1024),  # published MoE models have up to 512
            ("num_original_experts", self.num_original_experts, MAX_EXPERTS),  # with the dense FFN
            ("--original-copies", self.original_copies, 1024),
        ):
            if not 1 <= number <= most:
                raise UserError(f"{name} must be between 1 and {most}, got {number}")
        if not 1 <= self.topk <= self.num_experts:
            raise UserError(
                f"top-{self.topk} routing is impossible with {self.num_experts} experts ({self.num_new_experts} new + "
                f"{self.num_original_places} original); pass --topk between 1 and {self.num_experts}"
            )
        if self.original_copies > self.topk:
            raise UserError(
                f"--original-copies must be at most --topk, got {self.original_copies} and {self.topk}: with "
                f"{self.topk} copies, all choices of a token can be the dense FFN, and more copies add nothing"
            )
        if not self.layers:
            raise UserError("no layer would become an MoE layer; name at least one (--moe-layers 0,1,…) or use --dense")
        wrong = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if wrong:
            raise UserError(f"the model has no layer {wrong[0]}; pass --moe-layers from 0 to {num_layers - 1}")
        if list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"the MoE layers must be ascending and without repetition, got {list(self.layers)}")


@dataclass(frozen=True, config=STRICT)
class NewTokens:
    """The tokens that an extended tokenizer adds: their rows of the embedding and of the output layer are the new rows.

    All other rows are old rows and never change, including those that no token uses.

    Attributes:
        first: ID of the first new token, which is the number of IDs of the base's tokenizer.
        number: Number of new tokens; their IDs are contiguous.
        base_vocab_size: Rows of the base's embedding. If they are more than `first`, new tokens take the spare ones.
    """

    first: _Size
    number: _Size
    base_vocab_size: _Size

    @property
    def end(self) -> int:
        """The ID after the last new token."""
        return self.first + self.number

    @property
    def vocab_size(self) -> int:
        """Rows of the grown embedding, without padding."""
        return max(self.base_vocab_size, self.end)

    def check(self, vocab_size: int) -> None:
        """Raise a UserError unless a model of `vocab_size` rows can have these new tokens."""
        if self.first > self.base_vocab_size:
            raise UserError(
                f"new_tokens.first must be at most base_vocab_size ({self.base_vocab_size}), got {self.first}: "
                "old tokens would have no rows"
            )
        if vocab_size != self.vocab_size:
            raise UserError(f"with these new_tokens, vocab_size must be {self.vocab_size}, got {vocab_size}")


@dataclass(frozen=True, config=STRICT)
class ModelSpec(Record):
    """A model: its family, its shape in Megatron's terms, its experts and its new tokens.

    Attributes:
        family: A key of moelpr.model.families.families.FAMILIES, for example "qwen2".
        dtype: The dtype of the weights that it was converted from, one of DTYPES.
        megatron_args: The values of Megatron's flags (`MegatronArgs`); `vocab_size` is the embedding's rows without
            padding.
        moe: Its experts; null for a dense model.
        new_tokens: Its new tokens; absent if the vocabulary is the base's.
    """

    FILE_NAME: ClassVar[str] = FILE_NAME
    REMEDY: ClassVar[str] = "restore the file, or convert the model again"
    MISSING: ClassVar[str] = (
        f"has no {FILE_NAME}, so the model's shape is unknown; "
        "pass a folder written by moelpr model convert or by moelpr's trainer"
    )

    family: str
    dtype: str
    megatron_args: dict[str, Any]
    moe: MoeSpec | None = None
    new_tokens: NewTokens | None = None

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def is_linear_layer(self, layer: int) -> bool:
        """Whether the attention of a layer is a Gated DeltaNet."""
        pattern = self.megatron_args.get("linear_attention_freq")
        return pattern is not None and bool(pattern[layer])

    def as_dense(self) -> "ModelSpec":
        return replace(self, moe=None)

    def with_new_tokens(self, first: int, number: int) -> "ModelSpec":
        """The model with a row for each of `number` new tokens, whose IDs begin at `first`."""
        tokens = NewTokens(first, number, self.megatron_args["vocab_size"])
        return replace(self, megatron_args=self.megatron_args | {"vocab_size": tokens.vocab_size}, new_tokens=tokens)

    def check(self) -> None:
        """Raise a UserError unless all values are in range and fit each other."""
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        args = self.megatron_args
        records.validate(MegatronArgs, args, "megatron_args", f"restore the model's config.json or {FILE_NAME}")
        if args.get("use_rope_scaling") and "rope_scaling_factor" not in args:
            raise UserError("megatron_args lacks rope_scaling_factor, which use_rope_scaling requires")
        heads, groups = args["num_attention_heads"], args["num_query_groups"]
        if heads % groups:
            raise UserError(f"num_attention_heads ({heads}) must be a multiple of num_query_groups ({groups})")
        if args["rotary_percent"] != 1 and "linear_attention_freq" not in args:
            raise UserError(
                f"rotary_percent must be 1 in a model without linear attention, got {args['rotary_percent']}"
            )
        if (kinds := args.get("linear_attention_freq")) is not None and len(kinds) != args["num_layers"]:
            raise UserError(f"linear_attention_freq must have one number per layer, got {len(kinds)}")
        if self.moe is not None:
            self.moe.check(args["num_layers"])
        if self.new_tokens is not None:
            self.new_tokens.check(args["vocab_size"])

    def as_json(self) -> dict[str, Any]:
        """The fields as they are written; `new_tokens` only if there are some."""
        return {name: value for name, value in super().as_json().items() if name != "new_tokens" or value is not None}

    def write(self, folder: Path) -> None:
        """Write `folder`/model_spec.json."""
        self.check()
        super().write(folder)

    @classmethod
    def parse(cls, content: bytes | str, origin: str) -> Self:
        """Build the spec from JSON text, and check it."""
        spec = super().parse(content, origin)
        try:
            spec.check()
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        return spec
