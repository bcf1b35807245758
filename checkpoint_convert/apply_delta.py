"""Put a base model and a delta (mcore_to_hf.py --delta) together to the Hugging Face folder the delta was taken from.

    python -m checkpoint_convert.apply_delta --base DIR --delta DIR --save DIR

The result is, byte for byte, what mcore_to_hf.py writes without --delta. Weights stream: one tensor at a time; each is
checked against the checksum the delta has of it.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.delta import STEM, DeltaConfig, DeltaTensor, checksum
from checkpoint_convert.hf_folder import HfReader, HfWriter
from checkpoint_convert.mcore_to_hf import write_companions
from checkpoint_convert.outputs import check_free_space, check_output, job_description, progress_bar
from moelpr.errors import UserError, run_command
from moelpr.families.hf_config import CONFIG_FILE, read_config
from moelpr.files import resumable_directory


def apply_delta(base: Path, delta: Path, save: Path, overwrite: bool = False) -> DeltaConfig:
    """Write the model of the Hugging Face folder `base` and the folder `delta` to `save`.

    An interrupted call goes on where it stopped when it is made again with the same arguments.

    Raises UserError for bad input, a base other than the delta's among it; then `save` is what it was before.
    """
    for source in (base, delta):
        check_output(save, source, overwrite, (CONFIG_FILE,))
    config = DeltaConfig.read(delta)
    read_config(base)
    parts = _Parts(HfReader(base), HfReader(delta, STEM), config)
    parts.check_shapes()
    shapes = [(tensor.name, tensor.shape) for tensor in config.tensors]
    dtype = getattr(torch, config.dtype)
    num_bytes = dtype.itemsize * sum(math.prod(shape) for _, shape in shapes)
    check_free_space(save, num_bytes)
    job = job_description(delta, base=job_description(base))
    with resumable_directory(save, job) as folder, progress_bar(num_bytes, save.name) as bar:
        with HfWriter(folder, shapes, dtype, config.max_shard_bytes) as writer:
            for tensor in config.tensors:
                if not writer.is_written(tensor.name):
                    writer.write(tensor.name, parts.read(tensor))
                bar.update(math.prod(tensor.shape) * dtype.itemsize)
            writer.finish()
        write_companions(folder, base, config.config, config.card)
    return config


class _Parts:
    """The tensors of base and delta."""

    def __init__(self, base: HfReader, delta: HfReader, config: DeltaConfig):
        self._base, self._delta, self._config = base, delta, config

    def check_shapes(self) -> None:
        """UserError unless base and delta hold what delta_config.json lists; weights aren't read."""
        for tensor in self._config.tensors:
            if tensor.source == "base":
                if tensor.base not in self._base:
                    raise self._wrong_base(f"it lacks {tensor.base}")
                if self._base.shape(tensor.base) != tensor.shape:
                    raise self._wrong_base(f"{tensor.base} has another shape there")
            elif tensor.source == "delta" and self._delta.shape(tensor.name) != tensor.shape:
                raise self._damaged(tensor.name)

    def read(self, tensor: DeltaTensor) -> Tensor:
        """A tensor of the export; UserError where its bytes aren't those it had when the delta was written."""
        dtype = getattr(torch, self._config.dtype)
        if tensor.source == "zeros":
            return torch.zeros(tensor.shape, dtype=dtype)
        is_base = tensor.source == "base"
        found = (self._base.read(tensor.base) if is_base else self._delta.read(tensor.name)).to(dtype)
        if checksum(found) != tensor.sha256:
            raise self._wrong_base(f"{tensor.base} differs there") if is_base else self._damaged(tensor.name)
        return found

    def _wrong_base(self, reason: str) -> UserError:
        return UserError(
            f"{self._base.folder} is not {self._config.base_model}, the base of {self._delta.folder}, as it was when "
            f"the delta was made: {reason}; give --base the right model"
        )

    def _damaged(self, name: str) -> UserError:
        return UserError(f"{self._delta.folder} is damaged: {name} isn't what it was; copy the delta anew")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="apply_delta",
        description="Put a base model and a delta of mcore_to_hf.py --delta together to one Hugging Face folder.",
    )
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face folder of the base model")
    parser.add_argument("--delta", type=Path, required=True, help="folder with delta_config.json")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model at --save")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> None:
    args = _parse_arguments()
    config = apply_delta(args.base, args.delta, args.save, args.overwrite)
    print(f"{args.save}: {config.config['architectures'][0]}, {config.dtype}, of {config.base_model} and {args.delta}")


if __name__ == "__main__":
    run_command(main)
