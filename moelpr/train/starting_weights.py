"""The checkpoints that a run's weights come from and, with `--save-trained-only`, where its frozen weights stay.

A new run loads all weights here. A resumed run leaves its own checkpoint to Megatron (weights, optimizer, random state)
and loads here only the frozen tensors missing from that checkpoint.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training import print_rank_0
from megatron.training.checkpointing import _load_global_dist_base_checkpoint

from moelpr.base.errors import UserError
from moelpr.base.ranks import is_first_rank
from moelpr.base.run_folder import BASE_CHECKPOINT_FILE
from moelpr.model.checkpoints.chain import RELEASE, BaseCheckpoint, checkpoint_chain, checksum, verify_chain
from moelpr.model.checkpoints.torch_dist import read_metadata
from moelpr.model.layers.weights import load_weights, omit_extra_state, save_trained_only
from moelpr.train.arguments.settings import RunSettings


def starting_weights(settings: RunSettings, args: argparse.Namespace) -> Callable[[list[HybridModel]], None]:
    """Find the checkpoints that this run starts from; the result loads them into frozen, not yet wrapped chunks.

    `args` are Megatron's, which would load the weights of a new run again. UserError if a checkpoint is missing.
    """
    start = settings.start
    links = checkpoint_chain(start.checkpoint, start.selected_step, start.pretrained if start.is_resumed else None)
    if settings.save_trained_only and start.is_resumed and len(links) == 1:
        raise UserError(
            f"{start.checkpoint} was saved with --save-trained-only, but its {BASE_CHECKPOINT_FILE} is missing; "
            "restore it"
        )

    for link in links:
        read_metadata(link)  # Megatron ends with exit code 0, or with a traceback, if it can't read this

    def load(chunks: list[HybridModel]) -> None:
        verify_chain(links, settings.verify)
        load_step = partial(_load_step, args)
        if not args.use_cpu_initialization:
            for chunk in chunks:
                chunk.cuda(torch.cuda.current_device())  # as Megatron does next
        if not start.is_resumed:
            args.load = args.pretrained_checkpoint = None  # or Megatron would load them again
            print_rank_0(f"moelpr: weights from {' and '.join(map(str, links))}")
            load_weights(chunks, links, load=load_step)
        elif settings.save_trained_only:
            print_rank_0(f"moelpr: frozen weights from {' and '.join(map(str, links[1:]))}")
            load_weights(chunks, links[1:], only_frozen=True, load=load_step)
        omit_extra_state(chunks)
        for chunk in chunks if settings.save_trained_only else ():
            save_trained_only(chunk)
        if settings.save:
            _record_base(settings.save, links, settings)

    return load


def _load_step(args: argparse.Namespace, state: ShardedStateDict, step_folder: str) -> dict[str, Any]:
    """Load from one step folder as Megatron does, with all its flags."""
    folder, step = Path(step_folder).parent, Path(step_folder).name
    iteration = 0 if step == RELEASE else int(step.removeprefix("iter_"))
    return _load_global_dist_base_checkpoint(str(folder), args, False, state, iteration, step == RELEASE)[0]


def _record_base(save: Path, links: list[Path], settings: RunSettings) -> None:
    """Write base_checkpoint.json with the base's current folder on rank 0, or remove that of an earlier start."""
    base = None
    if settings.save_trained_only:
        start = settings.start
        record = BaseCheckpoint.read_if_there(start.checkpoint) if start.is_resumed else None
        link = links[1] if start.is_resumed else links[0]
        base = BaseCheckpoint.of(link, record.sha256 if record else checksum(link), save)
    if not is_first_rank() or base == BaseCheckpoint.read_if_there(save):
        return
    if base is None:
        (save / BASE_CHECKPOINT_FILE).unlink()
    else:
        base.write(save)
