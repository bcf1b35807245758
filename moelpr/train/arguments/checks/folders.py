"""The folders to load and save: which run they belong to, and whether a checkpoint can be written."""

import argparse
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moelpr.base.machine import format_bytes
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import trained_parts
from moelpr.plan import memory
from moelpr.train.arguments.requested import RequestedRun


def check_folders(run: RequestedRun) -> Iterable[str]:
    """--load has a checkpoint, and --save gets steps of one run only, as it has one base_checkpoint.json."""
    load, save = run.args.load, run.args.save
    if load and load != save and run.checkpoint not in (None, Path(load)):
        yield (
            f"--load {load} contains no checkpoint ({TRACKER_FILE} is missing), so the run would start from "
            f"{run.checkpoint}; use another folder, or remove --load"
        )
    if not save or not (Path(save) / TRACKER_FILE).exists() or run.checkpoint is None:
        return
    if not run.is_resumed or run.checkpoint != Path(save):
        flag = "--finetune" if run.args.finetune else "--load"
        yield (
            f"--save {save} contains checkpoints of a run, and {flag} would start another run from {run.checkpoint}; "
            f"change --save, or remove {flag} to resume the run"
        )


def check_save_disk(run: RequestedRun) -> Iterable[str]:
    """--save can be written, and a checkpoint fits; quotas, and what others write meanwhile, cannot be checked."""
    if run.args.save is None:
        return
    save = Path(run.args.save)
    existing = next(folder for folder in (save, *save.absolute().parents) if folder.exists())
    if not existing.is_dir():
        yield f"cannot create --save {save}: {existing} is a file; use another folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        why = f"the disk of {existing} is read-only" if is_read_only else f"no permission to write to {existing}"
        yield f"cannot write to --save {save}: {why}; fix that, or use a folder on another disk"
    elif run.spec is not None and run.args.save_interval:
        disk, needed = shutil.disk_usage(existing), checkpoint_bytes(run.args, run.spec)
        if disk.free < needed and disk.total > 0:  # some object stores report no size
            smaller = "" if run.args.save_trained_only or not run.is_moe else ", use --save-trained-only"
            yield (
                f"--save {save} is on a disk with {format_bytes(disk.free)} free, and a checkpoint of this run takes "
                f"about {format_bytes(needed)}; free some space{smaller}, or use a folder on another disk"
            )


def checkpoint_bytes(args: argparse.Namespace, spec: ModelSpec) -> int:
    """Bytes of the tensors in one checkpoint of a run."""
    return memory.checkpoint_bytes(
        memory.model_parts(spec),
        trained_parts(args.stage or "dense", args.train_everything, args.train_new_embeddings),
        "bf16" if args.bf16 or args.fp16 else "fp32",
        args.use_distributed_optimizer,
        args.save_trained_only,
        not args.no_save_optim,
    )
