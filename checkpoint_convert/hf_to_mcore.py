"""Turn a dense Hugging Face model into a Megatron checkpoint, upcycling its FFNs to experts on the way.

    python -m checkpoint_convert.hf_to_mcore --hf-path DIR --save DIR --num-new-experts 4 --topk 2

Expert 0 is the dense FFN, experts 1..N start as its copies (so the model still computes what the dense one did), each
router is drawn xavier-normal. Weights stream: one tensor at a time goes from safetensors to the checkpoint.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.families import Family, Piece, family_of, megatron_shape, pieces, sizes_of
from checkpoint_convert.hf_folder import HfReader, check_tokenizer, copy_companions, read_config
from checkpoint_convert.megatron_folder import HF_FOLDER
from checkpoint_convert.outputs import check_free_space, check_output, progress_bar
from checkpoint_convert.torch_dist import TorchDistWriter
from moelpr import model_spec
from moelpr.checkpoint_chain import RELEASE, TRACKER_FILE
from moelpr.errors import UserError, run_command
from moelpr.files import atomic_directory
from moelpr.model_spec import ModelSpec, MoeSpec

# Buffers that old checkpoints carry and no model reads.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def hf_to_mcore(
    hf_path: Path,
    save: Path,
    num_new_experts: int | None = 4,
    topk: int = 2,
    moe_layers: list[int] | None = None,
    moe_every_k_layers: int | None = None,
    new_experts: str = "copied",
    seed: int = 1234,
    dtype: str | None = None,
    overwrite: bool = False,
) -> ModelSpec:
    """Convert `hf_path` to a Megatron checkpoint folder `save`; returns what was written beside it.

    num_new_experts: N, or None for a plain dense checkpoint.
    moe_layers: 0-based layers to upcycle; moe_every_k_layers: layers k, 2k, … counted from 1; neither: all layers.
    new_experts: "copied" from the dense FFN or "random" (normal with the model's initializer_range; an ablation).
    dtype: element type to convert to (float32, bfloat16, float16); None keeps the model's.
    Raises UserError for bad input; then `save` is what it was before.
    """
    check_output(save, hf_path, overwrite, (model_spec.FILE_NAME, TRACKER_FILE))
    family = family_of(read_config(hf_path))
    megatron_args = read_shape(hf_path, family)
    moe = None
    if num_new_experts is not None:
        layers = choose_layers(megatron_args["num_layers"], moe_layers, moe_every_k_layers)
        moe = MoeSpec(num_new_experts, topk, layers)
    spec = ModelSpec(family.name, "float32", megatron_args, moe)
    spec.check()
    source = HfReader(hf_path)
    names = _check_weights(source, family, spec.as_dense())
    spec = replace(spec, dtype=dtype or _dtype_of(source, names))
    check_tokenizer(hf_path, megatron_args["vocab_size"])

    plan = list(pieces(family.table, spec))
    element_size = getattr(torch, spec.dtype).itemsize
    num_bytes = element_size * sum(math.prod(shape) for piece in plan for shape in piece.hf_shapes)
    check_free_space(save, num_bytes)
    with atomic_directory(save) as folder, progress_bar(num_bytes, save.name) as bar:
        write_checkpoint(folder, plan, spec, _tensors(source, plan, spec, new_experts, seed), bar)
        copy_companions(hf_path, folder / HF_FOLDER)
    return spec


def write_checkpoint(
    folder: Path, plan: list[Piece], spec: ModelSpec, tensors: Iterator[Tensor], bar: "tqdm[None]"
) -> None:
    """Write a release checkpoint: `tensors`, one for each piece of `plan` and in its order, and model_spec.json."""
    with TorchDistWriter(folder / RELEASE) as writer:
        _write_weights(writer, plan, spec, tensors, bar)
        for key in _extra_state_keys(plan):
            writer.write_object(key, None)
        writer.finish(_common_state())
    spec.write(folder)
    (folder / TRACKER_FILE).write_text(RELEASE)


def _write_weights(
    writer: TorchDistWriter, plan: list[Piece], spec: ModelSpec, tensors: Iterator[Tensor], bar: "tqdm[None]"
) -> None:
    for piece, tensor in zip(plan, tensors, strict=True):
        shape = megatron_shape(piece, spec)
        if piece.stack_index is None:
            writer.write(piece.key, tensor)
        else:
            offsets = (piece.stack_index, *(0 for _ in shape[1:]))
            writer.write_chunk(piece.key, tensor.unsqueeze(0), shape, offsets)
        bar.update(tensor.nbytes)


def _tensors(source: HfReader, plan: list[Piece], spec: ModelSpec, new_experts: str, seed: int) -> Iterator[Tensor]:
    """The Megatron tensor of every piece. Copies of an FFN follow each other, so that it is read once for all."""
    sizes, dtype = sizes_of(spec), getattr(torch, spec.dtype)
    read_origin: tuple[str, ...] = ()
    tensor = torch.empty(0)
    for piece in plan:
        if not piece.origin:
            router = torch.nn.init.xavier_normal_(torch.empty(piece.hf_shapes[0]), generator=_generator(seed, piece))
            yield router.to(dtype)
        elif piece.expert > 0 and new_experts == "random":
            fresh = torch.empty(megatron_shape(piece, spec)[1:])
            yield fresh.normal_(std=spec.megatron_args["init_method_std"], generator=_generator(seed, piece)).to(dtype)
        else:
            if piece.origin != read_origin:
                tensor = piece.transform.to_megatron([source.read(name) for name in piece.origin], sizes).to(dtype)
                read_origin = piece.origin
            yield tensor


def _generator(seed: int, piece: Piece) -> torch.Generator:
    """A random stream of its own per tensor, so that no draw depends on the order or on which layers are MoE layers."""
    digest = hashlib.sha256(f"{seed} {piece.key} {piece.expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def read_shape(hf_path: Path, family: Family) -> dict[str, Any]:
    """Megatron's arguments for the model. transformers reads the config, so that its defaults are filled in."""
    from transformers import AutoConfig

    raw = read_config(hf_path)
    if "quantization_config" in raw:
        raise UserError(f"{hf_path} is quantised (quantization_config); convert the unquantised model")
    try:
        config = AutoConfig.from_pretrained(hf_path, local_files_only=True)
    except Exception as error:  # whatever a damaged config makes transformers raise
        raise UserError(
            f"{hf_path}/config.json can't be read by transformers: {' '.join(str(error).split())}"
        ) from error
    try:
        return family.megatron_args(config)
    except UserError as error:
        raise UserError(f"{hf_path}/config.json: {error}") from error


def choose_layers(num_layers: int, chosen: list[int] | None, every_k: int | None) -> tuple[int, ...]:
    if chosen is not None and every_k is not None:
        raise UserError("--moe-layers and --moe-every-k-layers exclude each other; give one of them")
    if chosen is not None:
        return tuple(sorted(set(chosen)))
    if every_k is not None and not 1 <= every_k <= num_layers:
        raise UserError(f"--moe-every-k-layers {every_k} must lie between 1 and the model's {num_layers} layers")
    # Layers k, 2k, 3k, … counted from 1: the rule of decoder_sparse_step in transformers.
    return tuple(i for i in range(num_layers) if (i + 1) % (every_k or 1) == 0)


def _check_weights(source: HfReader, family: Family, dense: ModelSpec) -> set[str]:
    """Names of the model's tensors. UserError unless the folder holds just these, shaped as config.json says."""
    known: set[str] = set()
    for piece in pieces(family.table, dense):
        for name, shape in zip(piece.hf_names, piece.hf_shapes, strict=True):
            known.add(name)
            if source.shape(name) != shape:
                raise UserError(
                    f"{source.folder}: {name} has shape {list(source.shape(name))}, but config.json says {list(shape)}"
                )
            source.dtype(name)
    for name in source.names:
        if name not in known and not name.endswith(_IGNORED_SUFFIXES) and not _is_tied_copy(source, name):
            raise UserError(
                f"{source.folder} holds the tensor {name}, which a {family.architecture} with this config.json "
                "doesn't have; dropping it would change the model"
            )
    return known


def _is_tied_copy(source: HfReader, name: str) -> bool:
    """Some tied models also store their output layer; it's redundant if it equals the embedding."""
    embedding = "model.embed_tokens.weight"
    return (
        name == "lm_head.weight"
        and source.shape(name) == source.shape(embedding)
        and torch.equal(source.read(name), source.read(embedding))
    )


def _dtype_of(source: HfReader, names: set[str]) -> str:
    found = sorted({str(source.dtype(name)).removeprefix("torch.") for name in names})
    if len(found) > 1:
        raise UserError(f"{source.folder} mixes {' and '.join(found)}; choose one with --dtype")
    return found[0]


def _common_state() -> dict[str, Any]:
    """The non-tensor part that Megatron's load_checkpoint reads from a release checkpoint."""
    return {
        # Below 2.0 Megatron would reorder query, key and value rows.
        "checkpoint_version": 3.0,
        "iteration": 0,
        # One key per layer, as MoE and dense layers can stand side by side.
        "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
    }


def _extra_state_keys(plan: list[Piece]) -> list[str]:
    """Names of the (empty) module states Megatron's layers ask for when they load; FP8 would keep its scales there."""
    modules: dict[str, None] = {}
    for piece in plan:
        module = piece.key.rpartition(".")[0]
        modules[module] = None
        if module.endswith(".linear_qkv"):
            modules[module.removesuffix("linear_qkv") + "core_attention"] = None
    return [f"{module}._extra_state" for module in modules]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hf_to_mcore",
        description="Turn a dense Hugging Face model into a Megatron checkpoint whose FFNs are upcycled to experts.",
    )
    parser.add_argument(
        "--hf-path", type=Path, required=True, help="folder with config.json, safetensors and tokenizer"
    )
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to write")
    experts = parser.add_mutually_exclusive_group(required=True)
    experts.add_argument("--num-new-experts", type=int, metavar="N", help="experts added beside the original one")
    experts.add_argument("--dense", action="store_true", help="no experts: a plain dense checkpoint")
    parser.add_argument("--topk", type=int, default=2, metavar="K", help="experts per token (default: %(default)s)")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument(
        "--moe-layers", type=layer_list, metavar="0,2,5", help="layers to upcycle, 0-based (default: all)"
    )
    layers.add_argument(
        "--moe-every-k-layers", type=int, metavar="k", help="upcycle layers k, 2k, 3k, … counted from 1"
    )
    parser.add_argument(
        "--new-experts",
        choices=("copied", "random"),
        default="copied",
        help="start the new experts as copies of the dense FFN or at random, an ablation (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of routers and random experts (default: %(default)s)")
    parser.add_argument("--dtype", choices=model_spec.DTYPES, help="element type to convert to (default: the model's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint at --save")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def layer_list(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer numbers like 0,2,5") from None


def main() -> None:
    args = _parse_arguments()
    if args.dense and (
        args.moe_layers is not None or args.moe_every_k_layers is not None or args.new_experts == "random"
    ):
        raise UserError("--dense makes no experts, so --moe-layers, --moe-every-k-layers and --new-experts have no use")
    spec = hf_to_mcore(
        args.hf_path,
        args.save,
        num_new_experts=None if args.dense else args.num_new_experts,
        topk=args.topk,
        moe_layers=args.moe_layers,
        moe_every_k_layers=args.moe_every_k_layers,
        new_experts=args.new_experts,
        seed=args.seed,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    what = "dense"
    if spec.moe is not None:
        what = (
            f"{spec.moe.num_experts} experts (1 original + {spec.moe.num_new_experts} {args.new_experts}), "
            f"top-{spec.moe.topk}, in {len(spec.moe.layers)} of {spec.megatron_args['num_layers']} layers"
        )
    print(f"{args.save}: {spec.family}, {spec.dtype}, {what}")


if __name__ == "__main__":
    run_command(main)
