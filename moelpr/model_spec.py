"""`model_spec.json`: what a Megatron checkpoint folder holds, so that nobody has to repeat the model's shape as flags.

The converter writes it beside the weights, the trainer copies it into its own `--save` folder, the exporter reads it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moelpr.errors import UserError

FILE_NAME = "model_spec.json"
FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")

# The Megatron arguments a model can't be built without, and the type of each.
_REQUIRED_ARGS: dict[str, Any] = {
    "num_layers": int,
    "hidden_size": int,
    "ffn_hidden_size": int,
    "num_attention_heads": int,
    "num_query_groups": int,
    "group_query_attention": bool,
    "kv_channels": int,
    "max_position_embeddings": int,
    "position_embedding_type": str,
    "rotary_base": int,
    "normalization": str,
    "norm_epsilon": (int, float),
    "swiglu": bool,
    "add_bias_linear": bool,
    "add_qkv_bias": bool,
    "qk_layernorm": bool,
    "untie_embeddings_and_output_weights": bool,
    "vocab_size": int,
}


@dataclass(frozen=True)
class MoeSpec:
    """Which layers are MoE layers, and how many experts they have.

    num_new_experts: N, the experts of this round; every MoE layer has E = m + N experts.
    topk: K, experts per token.
    layers: 0-based numbers of the MoE layers, ascending; the others stay dense.
    num_original_experts: m; experts 0 to m - 1 are there before this round and stay as they are: the dense FFN, then
        the groups of earlier rounds in order.
    """

    num_new_experts: int
    topk: int
    layers: tuple[int, ...]
    num_original_experts: int = 1

    @property
    def num_experts(self) -> int:
        return self.num_original_experts + self.num_new_experts

    def check(self, num_layers: int) -> None:
        """Raise UserError unless a model of `num_layers` layers can be trained with these settings."""
        for name in ("num_new_experts", "num_original_experts", "topk"):
            if type(value := getattr(self, name)) is not int:
                raise UserError(f"moe.{name} is {value!r}, which is no whole number")
        if self.num_new_experts < 1:
            raise UserError(f"found {self.num_new_experts} new experts; at least 1 is needed, use --num-new-experts 1")
        if self.num_original_experts < 1:
            raise UserError(
                f"found {self.num_original_experts} original experts; the dense model's FFN is always one of them, "
                "so at least 1 is needed"
            )
        if self.topk == 1:
            raise UserError(
                "K = 1 can't be trained: renormalising makes every gate weight 1 and kills the router's gradient, "
                "use --topk 2"
            )
        if not 2 <= self.topk <= self.num_experts:
            raise UserError(
                f"top-{self.topk} needs at least {max(self.topk, 2)} experts and the layer has {self.num_experts} "
                f"({self.num_new_experts} new + {self.num_original_experts} original); "
                f"use --topk between 2 and {self.num_experts}"
            )
        if not self.layers:
            raise UserError("no layer would become an MoE layer; name at least one (--moe-layers 0,1,…) or use --dense")
        wrong = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if wrong:
            raise UserError(
                f"the model has no layer {wrong[0]}; its {num_layers} layers are numbered 0 to {num_layers - 1}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"the MoE layers {list(self.layers)} must be ascending and each named once")


@dataclass(frozen=True)
class ModelSpec:
    """One model: its family, its shape in Megatron's words, and its experts.

    family: key of moelpr.families.families.FAMILIES, e.g. "qwen2".
    dtype: element type of the weights it came from, one of DTYPES.
    megatron_args: Megatron argument (dest name) → value; `vocab_size` is the embedding's rows without padding.
    moe: None for a dense model.
    """

    family: str
    dtype: str
    megatron_args: dict[str, Any]
    moe: MoeSpec | None = None

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def as_dense(self) -> "ModelSpec":
        return replace(self, moe=None)

    def check(self) -> None:
        """Raise UserError when something is missing, of the wrong type or out of range."""
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        for name, kind in _REQUIRED_ARGS.items():
            if name not in self.megatron_args:
                raise UserError(f"megatron_args lacks {name}")
            value = self.megatron_args[name]
            # bool is an int to Python, but `num_layers: true` is a mistake.
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"megatron_args.{name} is {value!r}, not of the expected type")
            if kind is int and value < 1:
                raise UserError(f"megatron_args.{name} is {value}; it must be at least 1")
        heads, groups = self.megatron_args["num_attention_heads"], self.megatron_args["num_query_groups"]
        if heads % groups:
            raise UserError(f"{heads} attention heads do not divide into {groups} query groups")
        if self.moe is not None:
            self.moe.check(self.megatron_args["num_layers"])

    def write(self, folder: Path) -> None:
        """Write `folder`/model_spec.json."""
        self.check()
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "ModelSpec":
        """Read `folder`/model_spec.json; UserError when it is missing or not whole."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"{folder} has no {FILE_NAME}, so the model's shape is unknown; "
                "give a folder written by checkpoint_convert/hf_to_mcore.py or by moelpr's trainer"
            )
        try:
            content = json.loads(path.read_text())
            version = content.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise UserError(f"format_version is {version}, this program reads {FORMAT_VERSION}")
            moe = content.pop("moe", None)
            if moe is not None:
                moe = MoeSpec(**{**moe, "layers": tuple(moe["layers"])})
            spec = cls(**content, moe=moe)
            spec.check()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged or from another program: {error}") from error
        return spec
