"""A delta: what an export has beyond its base, its routers and new experts.

`delta_config.json` lists the export's tensors in order. Each comes from the base or from the delta's own safetensors,
with the SHA-256 it must have there, or is zero; so putting them together (apply_delta.py) needs no knowledge of the
model's family.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.hf_folder import HfWriter
from checkpoint_convert.megatron_folder import MegatronReader
from checkpoint_convert.model_card import FILE_NAME as CARD_FILE
from checkpoint_convert.model_card import Facts, model_card
from moelpr.errors import UserError
from moelpr.model_spec import DTYPES

FILE_NAME = "delta_config.json"
STEM = "delta"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class DeltaTensor:
    """One tensor of the export.

    source: "base", "delta" or "zeros". base: its name in the base. sha256: of its bytes in the export; "" for zeros.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    base: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class DeltaConfig:
    """What delta_config.json says.

    base_model: name of the base. experts: their numbers and layers, for people. config, card: config.json and README.md
    of the export. tensors: in the export's order.
    """

    base_model: str
    dtype: str
    max_shard_bytes: int
    experts: dict[str, Any]
    config: dict[str, Any]
    card: str
    tensors: tuple[DeltaTensor, ...]

    def write(self, folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **vars(self)}
        content["tensors"] = [_without_defaults(tensor) for tensor in self.tensors]
        (folder / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "DeltaConfig":
        """UserError when `folder` is no delta or its delta_config.json is damaged."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise UserError(f"{folder} has no {FILE_NAME}, so it is no delta; mcore_to_hf.py --delta writes one")
        try:
            content = json.loads(path.read_text())
            version = content.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise UserError(f"{path}: format_version is {version}, this program reads {FORMAT_VERSION}")
            tensors = tuple(DeltaTensor(**{**t, "shape": tuple(t["shape"])}) for t in content.pop("tensors"))
            delta = cls(**content, tensors=tensors)
            if delta.dtype not in DTYPES or not all(t.source in ("base", "delta", "zeros") for t in tensors):
                raise ValueError("an element type or a source that this program doesn't know")
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); copy the delta anew") from error
        return delta


def check_expressible(facts: Facts) -> None:
    """UserError for a model that isn't its base and a delta, or whose base has no name."""
    if facts.spec.moe is None:
        raise UserError("the model is dense and a delta holds routers and new experts; export it without --delta")
    for stage in facts.history.stages:
        if stage.trained_everything:
            raise UserError(
                f"{stage.folder} trained everything, so more than routers and new experts differs from the base; "
                "export it without --delta"
            )
    if facts.base_model is None:
        raise UserError("it isn't on record which model this one was upcycled from; name it with --base-model")


def num_bytes(source: MegatronReader, dtype: torch.dtype) -> int:
    """Size of the delta's weights in `dtype`."""
    return dtype.itemsize * sum(math.prod(source.shape(name)) for name in _trained_names(source))


def write_delta(
    folder: Path,
    source: MegatronReader,
    facts: Facts,
    config: dict[str, Any],
    max_shard_bytes: int,
    bar: "tqdm[None]",
) -> None:
    """Write routers and new experts of `source`, delta_config.json and the model card.

    config: config.json of the export; max_shard_bytes: of its files.
    """
    tensors = []
    trained = _trained_names(source)
    base_of = {
        name: base
        for piece in source.pieces
        if not piece.is_trained
        for name, base in zip(piece.hf_names, piece.origin, strict=True)
    }
    dtype = getattr(torch, facts.dtype)
    shapes = [(name, source.shape(name)) for name in source.names if name in trained]
    with HfWriter(folder, shapes, dtype, max_shard_bytes, STEM) as writer:
        for name in source.names:
            tensor = source.read_finite(name).to(dtype)
            if name in trained:
                tensors.append(DeltaTensor(name, tuple(tensor.shape), "delta", sha256=checksum(tensor)))
                if not writer.is_written(name):
                    writer.write(name, tensor)
            elif name in base_of:
                tensors.append(DeltaTensor(name, tuple(tensor.shape), "base", base_of[name], checksum(tensor)))
            else:
                tensors.append(DeltaTensor(name, tuple(tensor.shape), "zeros"))
            bar.update(tensor.nbytes)
        writer.finish()
    assert facts.base_model is not None and facts.spec.moe is not None
    card = model_card(facts)
    experts = asdict(facts.spec.moe)
    DeltaConfig(facts.base_model, facts.dtype, max_shard_bytes, experts, config, card, tuple(tensors)).write(folder)
    (folder / CARD_FILE).write_text(model_card(facts, is_delta=True), encoding="utf-8")


def _trained_names(source: MegatronReader) -> set[str]:
    """HF names of routers and new experts."""
    return {name for piece in source.pieces if piece.is_trained for name in piece.hf_names}


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes."""
    return hashlib.sha256(memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")).hexdigest()


def _without_defaults(tensor: DeltaTensor) -> dict[str, Any]:
    return {name: value for name, value in vars(tensor).items() if value != ""}
