"""`model_spec.json`: the model in a Megatron checkpoint folder, so that its shape need not be repeated as flags.

The converter writes it next to the weights, the trainer copies it to its `--save` folder, the exporter reads it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moelpr.process.errors import UserError
from moelpr.store.files import read_versioned

FILE_NAME = "model_spec.json"
FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
# Published models have at most a few hundred. A damaged number would be built, layer for layer, until memory is full.
MAX_LAYERS, MAX_EXPERTS = 10_000, 4096

# What the layers of every family are.
LAYERS = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope"}
_BOUNDS = {
    "rotary_percent": (1, 1), "attention_dropout": (0, 1), "hidden_dropout": (0, 1), "init_method_std": (0, 100),
    "rope_scaling_factor": (1e-3, 1e6),
}  # fmt: skip

# The Megatron arguments that a model can't be built without, by type.
_REQUIRED_ARGS: dict[Any, str] = {
    int: "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "max_position_embeddings rotary_base vocab_size",
    bool: "group_query_attention swiglu add_bias_linear add_qkv_bias qk_layernorm untie_embeddings_and_output_weights",
    str: "position_embedding_type normalization",
    (int, float): "norm_epsilon attention_dropout hidden_dropout init_method_std rotary_percent",
}
_OPTIONAL_ARGS: dict[Any, str] = {
    list: "window_size",
    bool: "use_rope_scaling",
    (int, float): "rope_scaling_factor",
}


@dataclass(frozen=True)
class MoeSpec:
    """Which layers are MoE layers, and their experts.

    Attributes:
        num_new_experts: N, the experts of this round.
        topk: K, experts per token.
        layers: 0-based numbers of the MoE layers, ascending; the others stay dense.
        num_original_experts: m; they exist before this round and don't change: the dense FFN, then the groups of
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
        """Raise a UserError if a model of `num_layers` layers can't be trained with these settings."""
        for name in ("num_new_experts", "num_original_experts", "original_copies", "topk"):
            if type(value := getattr(self, name)) is not int:
                raise UserError(f"moe.{name} must be an integer, got {value!r}")
        if not 1 <= self.num_new_experts <= 1024:  # published MoE models have up to 512
            raise UserError(f"--num-new-experts must be between 1 and 1024, got {self.num_new_experts}")
        if not 1 <= self.num_original_experts <= MAX_EXPERTS:
            raise UserError(
                f"num_original_experts must be from 1 (the dense FFN) to {MAX_EXPERTS}, got {self.num_original_experts}"
            )
        if not 1 <= self.original_copies <= 1024:
            raise UserError(
                f"--original-copies must be at least 1 (the dense FFN) and at most 1024, got {self.original_copies}"
            )
        if self.topk == 1:
            raise UserError("with K = 1 every gate weight is 1, so the router gets no gradient; pass --topk 2 or more")
        if not 2 <= self.topk <= self.num_experts:
            raise UserError(
                f"top-{self.topk} routing is impossible with {self.num_experts} experts ({self.num_new_experts} new + "
                f"{self.num_original_places} original); pass --topk between 2 and {self.num_experts}"
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


@dataclass(frozen=True)
class NewTokens:
    """The tokens that an extended tokenizer adds: their rows of the embedding and of the output layer are the new rows.

    All other rows are old rows and never change, including those that no token uses.

    Attributes:
        first: ID of the first new token, which is the number of IDs of the base's tokenizer.
        number: how many there are; their IDs are contiguous.
        base_vocab_size: rows of the base's embedding. If they are more than `first`, new tokens take the spare ones.
    """

    first: int
    number: int
    base_vocab_size: int

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
        for name, value in asdict(self).items():
            if type(value) is not int or not 1 <= value < 1 << 31:
                raise UserError(f"new_tokens.{name} must be an integer from 1 to 2^31 - 1, got {value!r}")
        if self.first > self.base_vocab_size:
            raise UserError(
                f"new_tokens.first must be at most base_vocab_size ({self.base_vocab_size}), got {self.first}: "
                "old tokens would have no rows"
            )
        if vocab_size != self.vocab_size:
            raise UserError(f"with these new_tokens, vocab_size must be {self.vocab_size}, got {vocab_size}")


@dataclass(frozen=True)
class ModelSpec:
    """A model: its family, its shape in Megatron's terms, its experts and its new tokens.

    Attributes:
        family: key of moelpr.families.families.FAMILIES, for example "qwen2".
        dtype: dtype of the weights it was converted from, one of DTYPES.
        megatron_args: Megatron argument (dest name) → value; `vocab_size` is the embedding's rows without padding.
        moe: None for a dense model.
        new_tokens: None if the vocabulary is the base's.
    """

    family: str
    dtype: str
    megatron_args: dict[str, Any]
    moe: MoeSpec | None = None
    new_tokens: NewTokens | None = None

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def as_dense(self) -> "ModelSpec":
        return replace(self, moe=None)

    def with_new_tokens(self, first: int, number: int) -> "ModelSpec":
        """The model with a row for each of `number` new tokens, whose IDs begin at `first`."""
        tokens = NewTokens(first, number, self.megatron_args["vocab_size"])
        args = self.megatron_args | {"vocab_size": tokens.vocab_size}
        return replace(self, megatron_args=args, new_tokens=tokens)

    def check(self) -> None:
        """Raise a UserError unless all fields are present, of the right type, and in range."""
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        args = dict(self.megatron_args)
        for kinds, is_required in ((_REQUIRED_ARGS, True), (_OPTIONAL_ARGS, False)):
            for kind, names in kinds.items():
                for name in names.split():
                    if name in args:
                        _check_argument(name, args.pop(name), kind)
                    elif is_required:
                        raise UserError(f"megatron_args lacks {name}")
        if args:
            raise UserError(f"megatron_args has the unknown name {min(args)}")
        for name, value in LAYERS.items():
            if self.megatron_args[name] != value:
                raise UserError(f"megatron_args.{name} must be {value!r}, got {self.megatron_args[name]!r}")
        for name, (least, most) in _BOUNDS.items():
            if not least <= self.megatron_args.get(name, least) <= most:  # NaN is not either
                raise UserError(f"megatron_args.{name} must be from {least} to {most}, got {self.megatron_args[name]}")
        window = self.megatron_args.get("window_size", [0, 0])
        if len(window) != 2 or not all(type(size) is int and size >= 0 for size in window):
            raise UserError(f"megatron_args.window_size must be two integers from 0, got {window}")
        if self.megatron_args.get("use_rope_scaling") and "rope_scaling_factor" not in self.megatron_args:
            raise UserError("megatron_args lacks rope_scaling_factor, which use_rope_scaling requires")
        if not 0 < self.megatron_args["norm_epsilon"] < 1:
            raise UserError(f"norm_epsilon must be above 0 and below 1, got {self.megatron_args['norm_epsilon']}")
        heads, groups = self.megatron_args["num_attention_heads"], self.megatron_args["num_query_groups"]
        if heads % groups:
            raise UserError(f"num_attention_heads ({heads}) must be a multiple of num_query_groups ({groups})")
        if self.moe is not None:
            self.moe.check(self.megatron_args["num_layers"])
        if self.new_tokens is not None:
            self.new_tokens.check(self.megatron_args["vocab_size"])

    def write(self, folder: Path) -> None:
        """Write `folder`/model_spec.json."""
        self.check()
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        if self.new_tokens is None:
            del content["new_tokens"]  # so that earlier versions of moelpr read the file
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "ModelSpec":
        """Read `folder`/model_spec.json.

        Raises:
            UserError: it is missing or invalid.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"{folder} has no {FILE_NAME}, so the model's shape is unknown; "
                "pass a folder written by checkpoint_convert/hf_to_mcore.py or by moelpr's trainer"
            )

        def build(
            moe: dict[str, Any] | None = None, new_tokens: dict[str, Any] | None = None, **fields: Any
        ) -> ModelSpec:
            experts = None if moe is None else MoeSpec(**{**moe, "layers": tuple(moe["layers"])})
            tokens = None if new_tokens is None else NewTokens(**new_tokens)
            spec = cls(**fields, moe=experts, new_tokens=tokens)
            spec.check()
            return spec

        return read_versioned(path, FORMAT_VERSION, build)


def _check_argument(name: str, value: Any, kind: Any) -> None:
    # bool is a subclass of int, but `num_layers: true` is a mistake.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"megatron_args.{name} has the wrong type: {value!r}")
    if name == "num_layers" and value > MAX_LAYERS:
        raise UserError(f"megatron_args.num_layers must be at most {MAX_LAYERS}, got {value}")
    if kind is int and not 1 <= value < 1 << 31:
        limit = "at least 1" if value < 1 else "below 2^31"
        raise UserError(f"megatron_args.{name} must be {limit}, got {value}")
