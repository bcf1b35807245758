"""What all converters share: their output folder, their progress bar, and weights that are no numbers."""

import errno
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moelpr.errors import UserError
from moelpr.files import refuse_existing


def check_output(save: Path, source: Path, overwrite: bool, signs: tuple[str, ...]) -> None:
    """Refuse an output that exists (without --overwrite), holds the input, or is a folder of some other kind.

    signs: file names one of which shows that the folder was made by the same command and may be replaced.
    """
    refuse_existing([save], overwrite)
    inside, around = save.resolve(), source.resolve()
    if inside == around or inside in around.parents or around in inside.parents:
        raise UserError(f"the output {save} and the input {source} must be separate folders; choose another --save")
    if save.exists() and not (save.is_dir() and any((save / sign).is_file() for sign in signs)):
        raise UserError(
            f"{save} exists and is not what this command writes, so it isn't overwritten; choose another --save"
        )


def check_free_space(save: Path, num_bytes: int) -> None:
    """Raise the error of a full disk before an hour of writing instead of after it."""
    parent = save.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if shutil.disk_usage(parent).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(save))


def job_description(source: Path, **settings: object) -> str:
    """A conversion and the state of the files it reads: what an interrupted one must have in common to be continued."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    states = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps({"source": str(source.resolve()), "files": states, **settings}, default=str)


def refuse_not_finite(tensor: Tensor, where: str, remedy: str) -> Tensor:
    """The tensor; UserError where a weight is NaN or infinite, as nothing computed with it means anything."""
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise UserError(f"{where} holds NaN or infinite weights; {remedy}")
    return tensor


def progress_bar(num_bytes: int, what: str) -> "tqdm[None]":
    """A bar by bytes on stderr, on a terminal only."""
    return tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=None)
