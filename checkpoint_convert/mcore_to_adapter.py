"""Turn a Megatron checkpoint into an adapter that the published MoE-LPR code loads.

    python -m checkpoint_convert.mcore_to_adapter --load DIR --save DIR --base-model NAME

The adapter holds routers and new experts; everything else must be the base model's. Weights stream: one tensor at a
time.
"""

import argparse
import math
from pathlib import Path

import torch

from checkpoint_convert.adapter import CONFIG_FILE, STEM, AdapterConfig, trained_names
from checkpoint_convert.hf_folder import HfWriter
from checkpoint_convert.history import read_history
from checkpoint_convert.megatron_folder import MegatronReader
from checkpoint_convert.outputs import check_free_space, check_output, progress_bar
from moelpr import model_spec
from moelpr.errors import UserError, run_command
from moelpr.files import atomic_directory
from moelpr.model_spec import ModelSpec


def mcore_to_adapter(
    load: Path,
    save: Path,
    base_model: str,
    iteration: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> AdapterConfig:
    """Write routers and new experts of the checkpoint folder `load` as the adapter folder `save`.

    base_model: name or path of the dense model, for adapter_config.json. iteration: saved step to read; None for the
    latest. dtype: None for that of the model it came from.
    Raises UserError for bad input and for a model that no adapter can express; then `save` is what it was before.
    """
    check_output(save, load, overwrite, (CONFIG_FILE,))
    moe = ModelSpec.read(load).moe
    if moe is None:
        raise UserError(f"{load} is dense and an adapter holds experts; export it with mcore_to_hf.py")
    if moe.num_original_experts > 1:
        raise UserError(
            f"{load} has {moe.num_original_experts} original experts and the published code knows one, the base's own "
            "FFN; export it with mcore_to_hf.py"
        )
    if any(stage.trained_everything for stage in read_history(load, iteration).stages):
        raise UserError(
            f"{load} was trained with --train-everything, and an adapter leaves all but routers and new experts to the "
            "base; export it with mcore_to_hf.py"
        )
    source = MegatronReader(load, iteration)
    config = AdapterConfig(moe.num_experts, moe.topk, moe.layers, base_model)
    target_dtype = getattr(torch, dtype or source.spec.dtype)
    names = {
        hf_name: name
        for piece in source.pieces
        if (trained := trained_names(piece))
        for hf_name, name in zip(piece.hf_names, trained, strict=True)
    }
    tensors = [(name, source.shape(hf_name)) for hf_name, name in names.items()]
    num_bytes = target_dtype.itemsize * sum(math.prod(shape) for _, shape in tensors)
    check_free_space(save, num_bytes)
    with atomic_directory(save) as folder, progress_bar(num_bytes, save.name) as bar:
        # PEFT reads one file.
        with HfWriter(folder, tensors, target_dtype, math.inf, STEM) as writer:
            for hf_name, name in names.items():
                tensor = source.read_finite(hf_name).to(target_dtype)
                writer.write(name, tensor)
                bar.update(tensor.nbytes)
            writer.finish()
        config.write(folder)
    return config


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mcore_to_adapter",
        description="Turn a Megatron checkpoint into an adapter that the published MoE-LPR code loads.",
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder of a converter or of the trainer")
    parser.add_argument("--save", type=Path, required=True, help="adapter folder to write")
    parser.add_argument("--base-model", required=True, metavar="NAME", help="the dense model, as PEFT will look for it")
    parser.add_argument("--iteration", type=int, help="saved step to read (default: the latest)")
    parser.add_argument("--dtype", choices=model_spec.DTYPES, help="element type (default: the model's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter at --save")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    config = mcore_to_adapter(args.load, args.save, args.base_model, args.iteration, args.dtype, args.overwrite)
    print(
        f"{args.save}: adapter of {config.base_model}, {config.num_experts} experts, top-{config.topk}, "
        f"in {len(config.layers)} layers"
    )


if __name__ == "__main__":
    run_command(main)
