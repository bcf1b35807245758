"""Turn an adapter of the published MoE-LPR code, and the dense model it belongs to, into a Megatron checkpoint.

    python -m checkpoint_convert.adapter_to_mcore --adapter DIR --hf-path BASE --save DIR

Routers and new experts come from the adapter, everything else from the base; training, export and evaluation go on from
there. Weights stream: one tensor at a time.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.adapter import CONFIG_FILE, AdapterConfig, AdapterReader, base_name, trained_names
from checkpoint_convert.hf_folder import HfReader, check_tokenizer, copy_companions
from checkpoint_convert.hf_to_mcore import check_weights, write_checkpoint
from checkpoint_convert.history import Origin
from checkpoint_convert.outputs import check_free_space, check_output, job_description, progress_bar, refuse_not_finite
from moelpr import model_spec
from moelpr.errors import UserError, run_command
from moelpr.families.base_model import read_base, with_new_experts
from moelpr.families.tables import Piece, pieces, sizes_of
from moelpr.files import resumable_directory
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import HF_FOLDER, TRACKER_FILE


def adapter_to_mcore(
    adapter: Path, hf_path: Path, save: Path, dtype: str | None = None, overwrite: bool = False
) -> ModelSpec:
    """Write the model of `adapter` on the dense model `hf_path` as the checkpoint folder `save`.

    dtype: element type to convert to (float32, bfloat16, float16); None keeps the one both have.
    Raises UserError for bad input; then `save` is what it was before.
    """
    for source in (adapter, hf_path):
        check_output(save, source, overwrite, (model_spec.FILE_NAME, TRACKER_FILE))
    config = AdapterConfig.read(adapter)
    family, dense = read_base(hf_path)
    if dense.moe is not None:
        raise UserError(f"{hf_path} is an MoE and an adapter belongs to a dense model; give the one it was trained on")
    num_layers = dense.megatron_args["num_layers"]
    if not family.may_mix_layers and len(config.layers) < num_layers:
        raise UserError(
            f"{adapter / CONFIG_FILE} has experts in {len(config.layers)} of {num_layers} layers, and a "
            f"{family.moe_architecture}, as which a {family.architecture} is exported, has them in every layer"
        )
    try:
        spec = with_new_experts(family, dense, config.num_experts - 1, config.topk, list(config.layers))
    except UserError as error:
        raise UserError(f"{adapter / CONFIG_FILE} does not fit {hf_path}: {error}") from error
    base, trained = HfReader(hf_path), AdapterReader(adapter)
    check_weights(base, family, dense)
    check_tokenizer(hf_path, spec.megatron_args["vocab_size"])

    plan = list(pieces(family.table, spec))
    places = {piece: _places(piece, base, trained) for piece in plan}
    all_places = [place for parts in places.values() for place in parts]
    _refuse_leftovers(trained, all_places)
    spec = replace(spec, dtype=dtype or _common_dtype(all_places))
    num_bytes = getattr(torch, spec.dtype).itemsize * sum(math.prod(place.shape) for place in all_places)
    check_free_space(save, num_bytes)
    job = job_description(adapter, base=job_description(hf_path), spec=asdict(spec))
    with resumable_directory(save, job) as folder, progress_bar(num_bytes, save.name) as bar:
        write_checkpoint(folder, plan, spec, lambda todo: _tensors(todo, places, spec), bar)
        copy_companions(hf_path, folder / HF_FOLDER)
        Origin(config.base_model or hf_path.resolve().name, adapter=adapter.resolve().name).write(folder)
    return spec


@dataclass(frozen=True)
class _Place:
    """Where a part of a piece lies."""

    reader: HfReader | AdapterReader
    name: str
    shape: tuple[int, ...]


def _places(piece: Piece, base: HfReader, trained: AdapterReader) -> list[_Place]:
    found: list[_Place] = []
    names = trained_names(piece) or tuple(base_name(name) for name in piece.origin)
    is_trained = bool(trained_names(piece))
    for name, original, shape in zip(names, piece.origin or names, piece.hf_shapes, strict=True):
        reader: HfReader | AdapterReader = trained
        if not is_trained and name not in trained:
            reader, name = base, original
        if reader.shape(name) != shape:
            raise UserError(
                f"{reader.folder}: {name} has shape {list(reader.shape(name))}, but its settings and the base model's "
                f"say {list(shape)}"
            )
        found.append(_Place(reader, name, shape))
    return found


def _refuse_leftovers(trained: AdapterReader, places: list[_Place]) -> None:
    used = {place.name for place in places if place.reader is trained}
    for name in trained.names:
        if name not in used:
            raise UserError(
                f"{trained.folder} holds the tensor {name}, of which its {CONFIG_FILE} doesn't speak; dropping it "
                "would change the model"
            )


def _common_dtype(places: list[_Place]) -> str:
    found: dict[str, _Place] = {}
    for place in places:
        found.setdefault(str(place.reader.dtype(place.name)).removeprefix("torch."), place)
    if len(found) > 1:
        which = " and ".join(f"{dtype} ({place.reader.folder})" for dtype, place in sorted(found.items()))
        raise UserError(f"base and adapter mix {which}; choose one with --dtype, float32 loses nothing")
    return next(iter(found))


def _tensors(plan: list[Piece], places: dict[Piece, list[_Place]], spec: ModelSpec) -> Iterator[Tensor]:
    sizes, dtype = sizes_of(spec), getattr(torch, spec.dtype)
    for piece in plan:
        parts = [
            refuse_not_finite(place.reader.read(place.name), f"{place.reader.folder}: {place.name}", "copy it anew")
            for place in places[piece]
        ]
        yield piece.transform.to_megatron(parts, sizes).to(dtype)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="adapter_to_mcore",
        description="Turn an adapter of the published MoE-LPR code and its base model into a Megatron checkpoint.",
    )
    parser.add_argument(
        "--adapter", type=Path, required=True, help="folder with adapter_config.json and adapter_model.safetensors"
    )
    parser.add_argument("--hf-path", type=Path, required=True, help="the dense Hugging Face model it was trained on")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--dtype", choices=model_spec.DTYPES, help="element type to convert to (default: the model's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint at --save")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    spec = adapter_to_mcore(args.adapter, args.hf_path, args.save, args.dtype, args.overwrite)
    assert spec.moe is not None
    named = AdapterConfig.read(args.adapter).base_model
    print(
        f"{args.save}: {spec.family}, {spec.dtype}, {spec.moe.num_experts} experts, top-{spec.moe.topk}; "
        f"the adapter names the base {named or '(none)'}, used was {args.hf_path}"
    )


if __name__ == "__main__":
    run_command(main)
