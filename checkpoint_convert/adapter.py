"""The adapter of the published MoE-LPR code: a PEFT folder of its settings, routers and new experts.

The base model's own FFN is its original expert: row 0 of a router, as here. What the files are called and hold is in
docs/published-code.md.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_convert.hf_folder import HfReader
from moelpr.errors import UserError
from moelpr.families.tables import Piece

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"

_MODEL = "base_model.model."


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says about the model.

    num_experts: E, the original expert included. layers: 0-based numbers of the MoE layers, ascending.
    base_model: name or path of the dense model, where the adapter says one.
    """

    num_experts: int
    topk: int
    layers: tuple[int, ...]
    base_model: str | None

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """UserError when `folder` is no adapter of the published code."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise UserError(f"{folder} has no {CONFIG_FILE}, so it is no adapter; give the folder PEFT saved it to")
        try:
            content = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if content.get("peft_type") != "MOE":
            raise UserError(
                f"{path} says peft_type {content.get('peft_type')!r}; only the adapters of the published MoE-LPR code "
                "(peft_type 'MOE') can be brought in"
            )
        layers = content.get("layers_to_transform")
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise UserError(f"{path}: layers_to_transform is {layers!r}; it must list the numbers of the MoE layers")
        for name in ("num_experts", "topk"):
            if type(content.get(name)) is not int:
                raise UserError(f"{path}: {name} is {content.get(name)!r}; it must be a whole number")
        if content["topk"] == 1:
            raise UserError(
                f"{path} says topk 1, which is another model here: the published code leaves the one gate weight as it "
                "is, and here the chosen experts' gate weights always sum to 1; topk 2 and more can be brought in"
            )
        return cls(
            content["num_experts"], content["topk"], tuple(sorted(set(layers))), content.get("base_model_name_or_path")
        )

    def write(self, folder: Path) -> None:
        """All keys of the published code's settings; those of its training are at their defaults."""
        content: dict[str, Any] = {
            "auto_mapping": None,
            "aux_loss_coef": None,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "init_moe_weights": True,
            "layers_to_transform": list(self.layers),
            "lpr_loss_coef": None,
            "num_experts": self.num_experts,
            "peft_type": "MOE",
            "revision": None,
            "save_all_params": False,
            "task_type": "CAUSAL_LM",
            "topk": self.topk,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def trained_names(piece: Piece) -> tuple[str, ...]:
    """Names in an adapter of the parts of a router or a new expert; () for what an adapter leaves to its base."""
    if not piece.is_trained:
        return ()
    layer = re.match(r"model\.layers\.\d+\.", piece.hf_names[0])
    assert layer is not None
    mlp = f"{layer[0]}mlp."
    if piece.role == "router":
        return (f"{_MODEL}{mlp}moe_router_embedding.weight",)
    # A new expert's origin is the dense FFN; its modules are called the same in the adapter's experts.
    modules = [name.removeprefix(mlp) for name in piece.origin]
    return tuple(f"{_MODEL}{mlp}moe_experts.{piece.stack_index}.{module}" for module in modules)


def base_name(name: str) -> str:
    """The name in an adapter of the base's tensor `name`: there where everything was trained (save_all_params)."""
    return _MODEL + name


class AdapterReader:
    """An adapter's tensors by the names of `trained_names` and `base_name`.

    PEFT leaves the adapter's own name, "default", out of tensors' names, but not under save_all_params; and an FFN that
    became the original expert is a `base_layer` there.
    """

    def __init__(self, folder: Path):
        """UserError for missing, damaged or pickled weights."""
        if not (folder / f"{STEM}.safetensors").is_file() and (folder / f"{STEM}.bin").is_file():
            raise UserError(
                f"{folder / STEM}.bin is pickled, which could run code when opened; make {STEM}.safetensors of it: "
                f"safetensors.torch.save_file(torch.load('{STEM}.bin', weights_only=True), '{STEM}.safetensors')"
            )
        self.folder = folder
        self._reader = HfReader(folder, STEM)
        self._stored: dict[str, str] = {}
        for name in self._reader.names:
            plain = re.sub(r"\.(moe_experts|moe_router_embedding)\.default\.", r".\1.", name)
            plain = plain.replace(".mlp.base_layer.", ".mlp.")
            if plain in self._stored:
                raise UserError(f"{folder} holds both {self._stored[plain]} and {name}, which are the same tensor")
            self._stored[plain] = name

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._stored.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._stored[name])

    def read(self, name: str) -> Tensor:
        return self._reader.read(self._stored[name])
