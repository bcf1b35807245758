"""The disk that --save is on: found unfit now, not at the first checkpoint, hours later."""

import argparse
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moelpr.arguments.checks.run import Run
from moelpr.families.families import family_named
from moelpr.families.tables import pieces
from moelpr.model_spec import ModelSpec
from moelpr.plan.memory import MASTER_BYTES, MOMENT_BYTES, WEIGHT_BYTES
from moelpr.plan.parts import parts_of
from moelpr.stages import trained_parts


def the_folder_to_save_in_can_be_written(run: Run) -> Iterable[str]:
    if run.args.save is None:
        return
    save = Path(run.args.save)
    existing = _existing_part(save)
    if not existing.is_dir():
        yield f"--save {save} can't be made: {existing} is a file; name another folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        why = f"the disk of {existing} is read-only" if is_read_only else f"no permission to write in {existing}"
        yield f"--save {save} can't be written: {why}; name a folder on another disk, or mend that"


def a_checkpoint_fits_on_the_disk(run: Run) -> Iterable[str]:
    """One checkpoint at least. Quotas, and what others write meanwhile, are seen only when the disk is full."""
    if run.args.save is None or run.spec is None or not run.args.save_interval:
        return
    existing = _existing_part(Path(run.args.save))
    disk = shutil.disk_usage(existing) if existing.is_dir() else None
    if disk is None or disk.total == 0:  # some object stores have no size
        return
    needed = checkpoint_bytes(run.args, run.spec)
    if disk.free < needed:
        less = "" if run.args.save_trained_only or not run.is_moe else ", save less with --save-trained-only"
        yield (
            f"--save {run.args.save} is on a disk with {_size(disk.free)} free, and a checkpoint of this run takes "
            f"about {_size(needed)}; free some space{less}, or name a folder on another disk"
        )


def checkpoint_bytes(args: argparse.Namespace, spec: ModelSpec) -> int:
    """Tensors of one checkpoint: the weights, and for what is trained the optimizer's state."""
    tensors = ((piece.key, math.prod(shape)) for piece in pieces(family_named(spec.family).table, spec)
               for shape in piece.hf_shapes)  # fmt: skip
    dtype = "bf16" if args.bf16 or args.fp16 else "fp32"
    trained = trained_parts(args.stage or "dense", args.train_everything)
    # The distributed optimizer writes a copy of fp32 weights too.
    master = MASTER_BYTES["bf16" if args.use_distributed_optimizer else dtype]
    state = 0 if args.no_save_optim else master + MOMENT_BYTES
    total = 0
    for size in parts_of(tensors):
        is_trained = size.part in trained
        weights = 0 if args.save_trained_only and not is_trained else WEIGHT_BYTES[dtype]
        total += size.numel * (weights + (state if is_trained else 0))
    return total


def _existing_part(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _size(number: float) -> str:
    power = min(int(math.log2(max(number, 1))) // 10, 4)
    return f"{number / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


CHECKS = (the_folder_to_save_in_can_be_written, a_checkpoint_fits_on_the_disk)
