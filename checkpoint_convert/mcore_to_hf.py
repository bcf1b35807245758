"""Turn a Megatron checkpoint into a Hugging Face folder that stock transformers loads, with no custom code.

    python -m checkpoint_convert.mcore_to_hf --load DIR --save DIR

A dense model leaves as its own class, an upcycled one as the stock MoE class of its family, the original experts first.
Weights stream: one tensor at a time goes from the checkpoint to safetensors.
"""

import argparse
import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoint_convert import delta
from checkpoint_convert.hf_folder import HfWriter, copy_companions
from checkpoint_convert.megatron_folder import MegatronReader
from checkpoint_convert.model_card import BASE_CARD_FILE, model_card, read_facts
from checkpoint_convert.model_card import FILE_NAME as CARD_FILE
from checkpoint_convert.outputs import check_free_space, check_output, job_description, progress_bar
from moelpr import model_spec
from moelpr.errors import UserError, run_command
from moelpr.families.families import family_named
from moelpr.families.hf_config import CONFIG_FILE, read_config
from moelpr.files import resumable_directory
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import HF_FOLDER

DEFAULT_SHARD_BYTES = 5 * 10**9


def mcore_to_hf(
    load: Path,
    save: Path,
    iteration: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    base_model: str | None = None,
    as_delta: bool = False,
) -> ModelSpec:
    """Export the checkpoint folder `load` to the Hugging Face folder `save`; returns what was exported.

    An interrupted export goes on where it stopped when it is called again with the same arguments.

    iteration: saved step to export; None for the latest. dtype: None for that of the model it came from.
    base_model: the base's name, for the model card; None for the one on record.
    as_delta: leave out what apply_delta.py can take from the base.
    Raises UserError for bad input; then `save` is what it was before.
    """
    check_output(save, load, overwrite, (CONFIG_FILE, delta.FILE_NAME))
    source = MegatronReader(load, iteration)
    spec, family = source.spec, source.family
    target_dtype = getattr(torch, dtype or spec.dtype)
    config = family.export_config(read_config(load / HF_FOLDER), spec, dtype or spec.dtype)

    facts = read_facts(source, iteration, config["architectures"][0], dtype or spec.dtype, base_model)
    if as_delta:
        delta.check_expressible(facts)

    tensors = [(name, source.shape(name)) for name in source.names]
    num_bytes = target_dtype.itemsize * sum(math.prod(shape) for _, shape in tensors)
    check_free_space(save, delta.num_bytes(source, target_dtype) if as_delta else num_bytes)
    job = job_description(source.step_folder, spec=asdict(spec), dtype=dtype, shards=max_shard_bytes, delta=as_delta)
    with resumable_directory(save, job) as folder, progress_bar(num_bytes, save.name) as bar:
        if as_delta:
            delta.write_delta(folder, source, facts, config, max_shard_bytes, bar)
            return spec
        with HfWriter(folder, tensors, target_dtype, max_shard_bytes) as writer:
            for name, shape in tensors:
                if not writer.is_written(name):
                    writer.write(name, source.read_finite(name).to(target_dtype))
                bar.update(math.prod(shape) * target_dtype.itemsize)
            writer.finish()
        write_companions(folder, load / HF_FOLDER, config, model_card(facts))
    return spec


def write_companions(folder: Path, base: Path, config: dict[str, Any], card: str) -> None:
    """Everything of an export in `folder` but its weights; `base` has the tokenizer and what else is the base's."""
    copy_companions(base, folder, skip=(CONFIG_FILE, CARD_FILE))
    if (base / CARD_FILE).is_file():
        shutil.copyfile(base / CARD_FILE, folder / BASE_CARD_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mcore_to_hf",
        description="Turn a Megatron checkpoint into a folder stock Hugging Face transformers loads.",
        epilog="An interrupted export leaves .NAME.partial beside SAVE; the same command goes on where it stopped.",
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder of hf_to_mcore or of the trainer")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--iteration", type=int, help="saved step to export (default: the latest)")
    parser.add_argument("--dtype", choices=model_spec.DTYPES, help="element type (default: the model's own)")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default=DEFAULT_SHARD_BYTES,
        metavar="SIZE",
        help="largest safetensors file, e.g. 500MB or 5GB, 1 GB = 10⁹ bytes (default: 5GB)",
    )
    parser.add_argument(
        "--base-model", metavar="NAME", help="the base's name on the hub, for the model card (default: its folder's)"
    )
    parser.add_argument(
        "--delta", action="store_true", help="write routers and new experts alone; apply_delta.py adds the base's rest"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model at --save")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 5GB")
    return max(1, int(float(match[1]) * {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]))


def main() -> None:
    args = _parse_arguments()
    if args.iteration is not None and args.iteration < 0:
        raise UserError(f"--iteration {args.iteration} must not be negative")
    spec = mcore_to_hf(
        args.load,
        args.save,
        args.iteration,
        args.dtype,
        args.max_shard_size,
        args.overwrite,
        args.base_model,
        args.delta,
    )
    family = family_named(spec.family)
    what = f"{family.architecture}, dense"
    if spec.moe is not None:
        what = f"{family.moe_architecture}, {spec.moe.num_experts} experts, top-{spec.moe.topk}"
    print(f"{args.save}: {'delta of ' if args.delta else ''}{what}, {args.dtype or spec.dtype}")


if __name__ == "__main__":
    run_command(main)
