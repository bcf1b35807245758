"""What all converters share: the output folder, its options on the command line, progress, and the check for NaN."""

import argparse
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moelpr.model_spec import DTYPES
from moelpr.process.errors import UserError
from moelpr.store.checksums import NO_VERIFY
from moelpr.store.files import partial_name, refuse_existing, resumable_directory


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add --load and --iteration."""
    parser.add_argument("--load", type=Path, required=True, metavar="DIR",
        help="checkpoint folder of a converter or the trainer")  # fmt: skip
    parser.add_argument("--iteration", type=int, metavar="STEP", help="saved step to read (default: the latest)")


def add_output_options(parser: argparse.ArgumentParser, output: str, dtype_default: str | None = None) -> None:
    """Add --save, --overwrite and, with a text for its default, --dtype."""
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help=f"{output} to write")
    if dtype_default:
        parser.add_argument("--dtype", choices=DTYPES, help=f"dtype of the output (default: {dtype_default})")
    parser.add_argument("--overwrite", action="store_true", help=f"replace an existing {output} at --save")
    parser.add_argument("--no-verify", **NO_VERIFY)
    parser.epilog = "An interrupted command leaves .NAME.partial beside the --save folder; rerun it to resume."


def check_output(save: Path, sources: list[Path], overwrite: bool, signs: tuple[str, ...]) -> None:
    """Check that `save` is free, or may be replaced, and is separate from the inputs.

    Args:
        signs: File names, one of which shows that an existing folder is an output of this command.

    Raises:
        UserError: the output exists (without `overwrite`), is inside or around an input, or is another kind of folder.
    """
    refuse_existing([save], overwrite)
    output = save.resolve()
    for source in sources:
        if output.is_relative_to(source.resolve()) or source.resolve().is_relative_to(output):
            raise UserError(f"the output {save} and the input {source} must be separate folders; choose another --save")
    if save.exists() and not (save.is_dir() and any((save / sign).is_file() for sign in signs)):
        raise UserError(f"{save} is not an output of this command and is not overwritten; choose another --save")


@contextmanager
def output_folder(
    save: Path, overwrite: bool, num_bytes: int, sources: list[Path], **settings: object
) -> Iterator[tuple[Path, "tqdm[None]"]]:
    """Yield a temporary folder that becomes `save` on success, and a progress bar in bytes (on a terminal only).

    Args:
        overwrite: Whether it may replace an existing folder.
        num_bytes: Size of the weights; if the disk has less space than is missing, nothing is written.
        sources: Input folders; an interrupted conversion resumes if their files and `settings` are unchanged.
    """
    parent = save.resolve().parent
    while not parent.exists():
        parent = parent.parent
    # What an interrupted conversion left is kept or replaced.
    left = sum(path.stat().st_size for path in partial_name(save.resolve()).rglob("*") if path.is_file())
    if shutil.disk_usage(parent).free < num_bytes - left:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(save))
    files = [path for source in sources for path in sorted(source.rglob("*")) if path.is_file()]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    job = json.dumps({"files": states, **settings}, default=str)
    with (
        resumable_directory(save, job) as folder,
        tqdm(total=num_bytes, desc=save.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        refuse_existing([save], overwrite)  # again: a job that started before may just have ended
        yield folder, bar


def cast(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The tensor in `dtype`; UserError if float16, whose largest number is 65,504, is too narrow for it."""
    result = tensor.to(dtype)
    if dtype is torch.float16 and tensor.dtype is not dtype:
        check_finite(result, f"{where} in float16", "its numbers are too large for it; pass another --dtype")
    return result


def check_finite(tensor: Tensor, where: str, fix: str) -> Tensor:
    """Return the tensor; UserError, with what to do (`fix`), if it contains NaN or Inf."""
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise UserError(f"{where} contains NaN or Inf; {fix}")
    return tensor
