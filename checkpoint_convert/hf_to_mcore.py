"""Turn a Hugging Face model into a Megatron checkpoint, upcycling its FFNs to experts on the way.

    python -m checkpoint_convert.hf_to_mcore --hf-path DIR --save DIR --num-new-experts 4 --topk 2

Expert 0 is the dense FFN, experts 1..N start as its copies (so the model still computes what the dense one did), each
router is drawn xavier-normal. A stock MoE, an earlier export for example, gets N further experts beside those it has.
Weights stream: one tensor at a time goes from safetensors to the checkpoint.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.hf_folder import HfReader, check_tokenizer, copy_companions, is_unread
from checkpoint_convert.history import Origin
from checkpoint_convert.outputs import check_free_space, check_output, job_description, progress_bar
from checkpoint_convert.torch_dist import TorchDistWriter
from checkpoint_convert.upcycling import Start, starting_tensors
from moelpr import model_spec
from moelpr.checkpoints import RELEASE
from moelpr.errors import UserError, run_command
from moelpr.families.base_model import layer_list, read_base, with_new_experts
from moelpr.families.families import Family
from moelpr.families.tables import Piece, megatron_shape, pieces, zeros
from moelpr.files import resumable_directory
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import HF_FOLDER, TRACKER_FILE


def hf_to_mcore(
    hf_path: Path,
    save: Path,
    num_new_experts: int | None = 4,
    topk: int | None = None,
    moe_layers: list[int] | None = None,
    moe_every_k_layers: int | None = None,
    start: Start | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> ModelSpec:
    """Convert `hf_path` to a Megatron checkpoint folder `save`; returns what was written beside it.

    An interrupted conversion goes on where it stopped when it is called again with the same arguments.

    num_new_experts: N, or None for a plain dense checkpoint.
    topk: None for 2, or what an MoE has.
    moe_layers: 0-based layers to upcycle; moe_every_k_layers: layers k, 2k, … counted from 1; neither: all layers.
    start: how new experts and routers start; None: the paper's way.
    dtype: element type to convert to (float32, bfloat16, float16); None keeps the model's.
    Raises UserError for bad input; then `save` is what it was before.
    """
    start = start or Start()
    start.check()
    check_output(save, hf_path, overwrite, (model_spec.FILE_NAME, TRACKER_FILE))
    family, base = read_base(hf_path)
    if num_new_experts is not None:
        spec = with_new_experts(family, base, num_new_experts, topk, moe_layers, moe_every_k_layers)
    elif base.moe is None:
        spec = base
    else:
        raise UserError(f"{hf_path} is an MoE, which can't become a dense checkpoint; give --num-new-experts")
    spec.check()
    source = HfReader(hf_path)
    names = check_weights(source, family, base)
    spec = replace(spec, dtype=dtype or _dtype_of(source, names))
    check_tokenizer(hf_path, spec.megatron_args["vocab_size"])

    plan = list(pieces(family.table, spec))
    num_bytes = getattr(torch, spec.dtype).itemsize * _numel(plan)
    check_free_space(save, num_bytes)
    job = job_description(hf_path, spec=asdict(spec), start=asdict(start))
    with resumable_directory(save, job) as folder, progress_bar(num_bytes, save.name) as bar:
        write_checkpoint(folder, plan, spec, lambda todo: starting_tensors(source, todo, spec, start), bar)
        copy_companions(hf_path, folder / HF_FOLDER)
        Origin(hf_path.resolve().name, asdict(start) if spec.moe else {}).write(folder)
    return spec


def write_checkpoint(
    folder: Path,
    plan: list[Piece],
    spec: ModelSpec,
    read: Callable[[list[Piece]], Iterable[Tensor]],
    bar: "tqdm[None]",
) -> None:
    """Write a release checkpoint and model_spec.json, or go on with an interrupted one.

    read: gives the tensors of the pieces it is handed, in their order.
    """
    with TorchDistWriter(folder / RELEASE) as writer:
        todo = [piece for piece in plan if not writer.is_written(piece.key, _offsets(piece, spec))]
        bar.update(round(bar.total * (1 - _numel(todo) / _numel(plan))))
        tensors = iter(read(todo))
        for piece in todo:
            bar.update(_write_piece(writer, piece, spec, next(tensors)))  # one tensor in memory
        for key in _extra_state_keys(plan):
            writer.write_object(key, None)
        writer.finish(_common_state())
    spec.write(folder)
    (folder / TRACKER_FILE).write_text(RELEASE)


def _numel(plan: list[Piece]) -> int:
    return sum(math.prod(shape) for piece in plan for shape in piece.hf_shapes)


def _write_piece(writer: TorchDistWriter, piece: Piece, spec: ModelSpec, tensor: Tensor) -> int:
    """Returns its bytes."""
    shape = megatron_shape(piece, spec)
    if piece.stack_index is None:
        writer.write(piece.key, tensor)
    else:
        writer.write_chunk(piece.key, tensor.unsqueeze(0), shape, _offsets(piece, spec))
    return tensor.nbytes


def _offsets(piece: Piece, spec: ModelSpec) -> tuple[int, ...]:
    """Where the piece lies in its Megatron tensor."""
    dimensions = len(megatron_shape(piece, spec))
    return (piece.stack_index or 0, *(0 for _ in range(dimensions - 1)))


def check_weights(source: HfReader, family: Family, base: ModelSpec) -> set[str]:
    """Names of the model's tensors. UserError unless the folder holds just these, shaped as config.json says."""
    known: set[str] = set()
    empty = {name for name, _ in zeros(family.table, base)}
    for piece in pieces(family.table, base):
        for name, shape in zip(piece.hf_names, piece.hf_shapes, strict=True):
            known.add(name)
            if source.shape(name) != shape:
                raise UserError(
                    f"{source.folder}: {name} has shape {list(source.shape(name))}, but config.json says {list(shape)}"
                )
            source.dtype(name)
    for name in source.names:
        if name in known or name in empty or is_unread(source, name):
            continue
        raise UserError(
            f"{source.folder} holds the tensor {name}, which a {family.name} model with this config.json "
            "doesn't have; dropping it would change the model"
        )
    return known


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
        description="Turn a Hugging Face model into a Megatron checkpoint whose FFNs are upcycled to experts.",
        epilog="An interrupted conversion leaves .NAME.partial beside SAVE; the same command goes on where it stopped.",
    )
    parser.add_argument(
        "--hf-path", type=Path, required=True, help="folder with config.json, safetensors and tokenizer"
    )
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to write")
    experts = parser.add_mutually_exclusive_group(required=True)
    experts.add_argument("--num-new-experts", type=int, metavar="N", help="experts to add")
    experts.add_argument("--dense", action="store_true", help="no experts: a plain dense checkpoint")
    parser.add_argument("--topk", type=int, metavar="K", help="experts per token (default: 2, or what an MoE has)")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument(
        "--moe-layers", type=layer_list, metavar="0,2,5", help="layers to upcycle, 0-based (default: all)"
    )
    layers.add_argument(
        "--moe-every-k-layers", type=int, metavar="k", help="upcycle layers k, 2k, 3k, … counted from 1"
    )
    group = parser.add_argument_group("how new experts start")
    group.add_argument(
        "--new-experts",
        choices=("copied", "random"),
        default="copied",
        help="copies of the FFN (beside other experts: of expert 0), or random, an ablation (default: %(default)s)",
    )
    group.add_argument(
        "--expert-noise",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="add noise to each copy, this share of a weight's standard deviation (default: 0)",
    )
    group.add_argument(
        "--reinitialise",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="draw this share of each copy's FFN dimensions anew, 0 to 1: Drop-Upcycling (default: 0)",
    )
    group.add_argument("--seed", type=int, default=1234, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--dtype", choices=model_spec.DTYPES, help="element type to convert to (default: the model's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint at --save")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    start = Start(args.new_experts, args.expert_noise, args.reinitialise, args.seed)
    if args.dense and (
        args.moe_layers is not None
        or args.moe_every_k_layers is not None
        or args.topk
        or start != Start(seed=args.seed)
    ):
        raise UserError("--dense makes no experts, so --topk and the flags that choose layers or starts have no use")
    spec = hf_to_mcore(
        args.hf_path,
        args.save,
        num_new_experts=None if args.dense else args.num_new_experts,
        topk=args.topk,
        moe_layers=args.moe_layers,
        moe_every_k_layers=args.moe_every_k_layers,
        start=start,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    print(f"{args.save}: {spec.family}, {spec.dtype}, {_experts_in_words(spec)}")


def _experts_in_words(spec: ModelSpec) -> str:
    if spec.moe is None:
        return "dense"
    return (
        f"{spec.moe.num_experts} experts ({spec.moe.num_original_experts} original + {spec.moe.num_new_experts} new), "
        f"top-{spec.moe.topk}, in {len(spec.moe.layers)} of {spec.megatron_args['num_layers']} layers"
    )


if __name__ == "__main__":
    run_command(main)
