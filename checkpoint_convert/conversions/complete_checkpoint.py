"""Writes a checkpoint whose steps may hold only what was trained as one that needs no base."""

from dataclasses import replace
from pathlib import Path

from checkpoint_convert.card.origin import Origin
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.mcore.megatron_folder import SIGNS, MegatronReader, write_checkpoint
from moelpr.base.checksums import Verify
from moelpr.base.copies import copy_folder
from moelpr.base.run_folder import HF_FOLDER
from moelpr.model.checkpoints.chain import checkpoint_chain


def whole_checkpoint(
    load: Path, save: Path, iteration: int | None = None, overwrite: bool = False, verify: Verify = Verify.FULL
) -> None:
    """Write one step (None for the latest) as a checkpoint that needs no base; tensors keep their dtype.

    Raises:
        UserError: the input is invalid; `save` is then unchanged.
    """
    check_output(save, [load, *(link.parent for link in checkpoint_chain(load, iteration))], overwrite, SIGNS)
    source = MegatronReader(load, iteration, verify=verify)
    num_bytes = sum(source.num_bytes(piece) for piece in source.pieces)
    with output_folder(save, overwrite, num_bytes, [source.step_folder]) as (folder, journal, bar):
        write_checkpoint(journal, source.pieces, source.spec, lambda todo: map(source.read_piece, todo), bar)
        if (load / HF_FOLDER).is_dir():
            copy_folder(load / HF_FOLDER, folder / HF_FOLDER)
        replace(Origin.of(load), copy_of=str(source.step_folder.resolve())).write(folder / HF_FOLDER)
