"""Adapters of the published MoE-LPR code: PEFT folders of settings, routers and new experts, converted both ways.

As here, the base model's FFN is the original expert and row 0 of a router. docs/published-code.md describes the files.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass
from torch import Tensor

from checkpoint_convert.card.history import check_frozen_is_the_base, check_separable, read_history
from checkpoint_convert.card.origin import Origin
from checkpoint_convert.common.numbers import cast, check_finite
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.hf.checks import check_tokenizer, check_weights
from checkpoint_convert.hf.companions import copy_companions, record_dtype
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from checkpoint_convert.hf.safetensors_writer import write_weights
from checkpoint_convert.mcore.megatron_folder import SIGNS, MegatronReader, num_elements, write_checkpoint
from moelpr.base import records
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.records import FOREIGN
from moelpr.base.run_folder import HF_FOLDER
from moelpr.model.families.families import family_named, read_base
from moelpr.model.families.new_experts import NewExperts, with_new_experts
from moelpr.model.families.tables import Piece, pieces, sizes_of
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Part

STEM = "adapter_model"
_PREFIX = "base_model.model."


def _at_least_2(topk: int) -> int:
    if topk == 1:
        raise UserError("topk must be at least 2 (with 1, the published code computes another model), got 1")
    return topk


@dataclass(frozen=True, config=FOREIGN)
class AdapterConfig:
    """The settings in adapter_config.json, under the names of the published code; those for training have defaults.

    Attributes:
        num_experts: E, including the original expert.
        topk: K.
        layers_to_transform: 0-based numbers of the MoE layers.
        base_model_name_or_path: Name or path of the dense model, if the adapter names one.
        save_all_params: Whether everything was trained, and saved.
    """

    FILE_NAME: ClassVar[str] = "adapter_config.json"

    num_experts: int
    topk: Annotated[int, AfterValidator(_at_least_2)]
    layers_to_transform: list[int]
    base_model_name_or_path: str | None = None
    peft_type: Literal["MOE"] = "MOE"
    auto_mapping: Any = None
    aux_loss_coef: Any = None
    inference_mode: Any = True
    init_moe_weights: Any = True
    lpr_loss_coef: Any = None
    revision: Any = None
    save_all_params: Any = False
    task_type: Any = "CAUSAL_LM"

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read adapter_config.json; UserError if `folder` is not an adapter of the published code."""
        path = folder / cls.FILE_NAME
        if not path.is_file():
            raise UserError(f"{folder} is not an adapter: it has no {cls.FILE_NAME}; pass the folder that PEFT saved")
        return records.read(cls, path, "pass an adapter of the published MoE-LPR code")

    def write(self, folder: Path) -> None:
        """Write all settings."""
        (folder / self.FILE_NAME).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")


def _trained_names(piece: Piece) -> tuple[str, ...]:
    """Names in an adapter of the parts of a router or new expert; () for a piece of the base."""
    if not piece.is_trained:
        return ()
    layer = ".".join(piece.hf_names[0].split(".")[:3])
    mlp = f"{layer}.mlp."
    if piece.part is Part.ROUTER:
        return (f"{_PREFIX}{mlp}moe_router_embedding.weight",)
    # An expert has the module names of the dense FFN, its origin.
    modules = [name.removeprefix(mlp) for name in piece.origin]
    return tuple(f"{_PREFIX}{mlp}moe_experts.{piece.stack_index}.{module}" for module in modules)


def _stored_names(reader: HfReader) -> dict[str, str]:
    """Name without the adapter's own → name in the file.

    With save_all_params, the file contains the base too, and the adapter's own name, "default", is in the names of new
    tensors and "base_layer" in those of an FFN that became the original expert.
    """
    stored: dict[str, str] = {}
    for name in reader.names:
        plain = re.sub(r"\.(moe_experts|moe_router_embedding)\.default\.", r".\1.", name)
        plain = plain.replace(".mlp.base_layer.", ".mlp.")
        if plain in stored:
            raise UserError(f"{reader.folder} contains both {stored[plain]} and {name}, which are the same tensor")
        stored[plain] = name
    return stored


def adapter_to_mcore(
    adapter: Path,
    hf_path: Path,
    save: Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: Verify = Verify.FULL,
) -> ModelSpec:
    """Combine an adapter and its dense model to a Megatron checkpoint; an interrupted conversion resumes.

    Args:
        dtype: Dtype of the checkpoint (float32, bfloat16, float16); None for the common one of adapter and model.

    Raises:
        UserError: the input is invalid; `save` is then unchanged.
    """
    check_output(save, [adapter, hf_path], overwrite, SIGNS)
    config = AdapterConfig.read(adapter)
    family, dense = read_base(hf_path)
    if family.dense_names:
        raise UserError(
            f"{hf_path} joins projections, which the published code does not support; pass its adapter's base"
        )
    if dense.moe is not None:
        raise UserError(f"{hf_path} is an MoE; pass the dense model that the adapter was trained on")
    experts = NewExperts(config.num_experts - 1, config.topk, moe_layers=sorted(set(config.layers_to_transform)))
    try:
        spec = with_new_experts(family, dense, experts)
    except UserError as error:
        raise UserError(f"{adapter / AdapterConfig.FILE_NAME} does not fit {hf_path}: {error}") from error
    base, trained = HfReader(hf_path, verify=verify), _open_adapter(adapter, verify)
    base_names = check_weights(base, family, dense, list(pieces(family.table, dense)))
    check_tokenizer(hf_path, spec.megatron_args["vocab_size"])

    plan = list(pieces(family.table, spec))
    stored = _stored_names(trained)
    parts = {piece: _find_parts(piece, base, trained, stored) for piece in plan}
    all_parts = [part for found in parts.values() for part in found]
    used = {name for reader, name in all_parts if reader is trained}
    if unused := [name for name in trained.names if name not in used]:
        raise UserError(
            f"{adapter} contains the tensor {unused[0]}, which {AdapterConfig.FILE_NAME} does not describe; ignoring "
            "it would change the model"
        )
    spec = replace(spec, dtype=dtype or common_dtype(all_parts))
    target_dtype: torch.dtype = getattr(torch, spec.dtype)

    def tensors(todo: list[Piece]) -> Iterator[Tensor]:
        for piece in todo:
            read = [check_finite(r.read(name), f"{r.folder}: {name}", "copy it again") for r, name in parts[piece]]
            yield cast(piece.transform.to_megatron(read, sizes_of(spec)), target_dtype, piece.key)

    num_bytes = target_dtype.itemsize * num_elements(plan)
    sources = [adapter, hf_path]
    with output_folder(save, overwrite, num_bytes, sources, spec=asdict(spec)) as (folder, journal, bar):
        copy_companions(hf_path, folder / HF_FOLDER)
        record_dtype(folder / HF_FOLDER, ((base, name) for name in base_names))
        name = config.base_model_name_or_path or hf_path.resolve().name
        has_other_base = _has_other_base(parts, base, target_dtype)
        Origin(name, adapter=adapter.resolve().name, has_other_base=has_other_base).write(folder / HF_FOLDER)
        write_checkpoint(journal, plan, spec, tensors, bar)
    return spec


def _has_other_base(parts: dict[Piece, list[tuple[HfReader, str]]], base: HfReader, dtype: torch.dtype) -> bool:
    """Whether frozen weights were read from the adapter and are not those of the base."""
    return any(
        not torch.equal(reader.read(name).to(dtype), base.read(original).to(dtype))
        for piece, found in parts.items()
        if not piece.is_trained
        for (reader, name), original in zip(found, piece.origin, strict=True)
        if reader is not base
    )


def _open_adapter(folder: Path, verify: Verify) -> HfReader:
    if not (folder / f"{STEM}.safetensors").is_file() and (folder / f"{STEM}.bin").is_file():
        raise UserError(
            f"{folder / STEM}.bin is pickled, which could run code when opened; convert it to {STEM}.safetensors: "
            f"safetensors.torch.save_file(torch.load('{STEM}.bin', weights_only=True), '{STEM}.safetensors')"
        )
    return HfReader(folder, STEM, verify)


def _find_parts(piece: Piece, base: HfReader, adapter: HfReader, stored: dict[str, str]) -> list[tuple[HfReader, str]]:
    """Reader and name of each part: trained ones are in the adapter, others in the base or (save_all_params) both."""
    found = []
    names = _trained_names(piece) or tuple(_PREFIX + name for name in piece.origin)
    for name, original, shape in zip(names, piece.origin or names, piece.hf_shapes, strict=True):
        is_in_adapter = piece.is_trained or name in stored
        reader, name = (adapter, stored.get(name, name)) if is_in_adapter else (base, original)
        if reader.shape(name) != shape:
            raise UserError(
                f"{reader.folder}: {name} has shape {list(reader.shape(name))}, but {AdapterConfig.FILE_NAME} and the "
                f"base's config.json say {list(shape)}"
            )
        found.append((reader, name))
    return found


def mcore_to_adapter(
    load: Path,
    save: Path,
    base_model: str,
    iteration: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: Verify = Verify.FULL,
) -> AdapterConfig:
    """Export routers and new experts of a checkpoint as an adapter.

    Args:
        base_model: Name or path of the dense model, for adapter_config.json.
        iteration: Saved step to export; None for the latest.
        dtype: None for that of the model the checkpoint came from.

    Raises:
        UserError: the input is invalid, or no adapter can express the model; `save` is then unchanged.
    """
    check_output(save, [load], overwrite, (AdapterConfig.FILE_NAME,))
    instead = "export it with moelpr model export"
    spec = ModelSpec.read(load)
    moe, tokens = spec.moe, spec.new_tokens

    def unsupported(found: str, supported: str) -> UserError:
        return UserError(f"{load} has {found}, but the published code supports only {supported}; {instead}")

    if moe is not None and moe.num_original_experts > 1:
        raise unsupported(f"{moe.num_original_experts} original experts", "one, the base's FFN")
    if moe is not None and moe.original_copies > 1:
        raise unsupported(f"{moe.original_copies} copies of the base's FFN", "one")
    if family_named(spec.family).dense_names:
        raise unsupported("joined projections", "FFNs of three matrices with Llama's names")
    if tokens is not None:
        raise unsupported(f"{tokens.number:,} new tokens", "the base's vocabulary")
    check_separable(load, spec, Origin.of(load), read_history(load, iteration), "an adapter", instead)
    source = MegatronReader(load, iteration, verify=verify)
    check_frozen_is_the_base(source, dtype or spec.dtype, "an adapter", instead)
    assert moe is not None
    config = AdapterConfig(moe.num_experts, moe.topk, list(moe.layers), base_model)
    trained = [piece for piece in source.pieces if piece.is_trained]
    hf_names = dict(pair for piece in trained for pair in zip(_trained_names(piece), piece.hf_names, strict=True))
    tensors = [(name, source.shape(hf_name)) for name, hf_name in hf_names.items()]
    target_dtype: torch.dtype = getattr(torch, dtype or spec.dtype)
    num_bytes = target_dtype.itemsize * sum(math.prod(shape) for _, shape in tensors)
    settings = {"adapter": asdict(config), "dtype": dtype}
    with output_folder(save, overwrite, num_bytes, [source.step_folder], **settings) as (folder, journal, bar):
        # PEFT reads a single file.
        write_weights(
            journal, tensors, target_dtype, math.inf, lambda name: source.read_finite(hf_names[name]), bar, STEM
        )
        config.write(folder)
    return config
