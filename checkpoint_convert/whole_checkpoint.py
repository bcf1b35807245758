"""Make a whole checkpoint of one that holds only what a run trained (--save-trained-only).

    python -m checkpoint_convert.whole_checkpoint --load runs/stage2 --save runs/stage2-whole

The result has weights only and needs no other folder. Tensors keep their element type; one is in memory at a time.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from checkpoint_convert.hf_to_mcore import write_checkpoint
from checkpoint_convert.history import Origin
from checkpoint_convert.megatron_folder import MegatronReader
from checkpoint_convert.outputs import check_free_space, check_output, job_description, progress_bar
from moelpr import model_spec
from moelpr.errors import run_command
from moelpr.files import resumable_directory
from moelpr.run_folder import HF_FOLDER, TRACKER_FILE


def whole_checkpoint(load: Path, save: Path, iteration: int | None = None, overwrite: bool = False) -> None:
    """Write the model in `load` as the checkpoint folder `save`.

    iteration: saved step to read; None for the latest.
    Raises UserError for bad input; then `save` is what it was before.
    """
    check_output(save, load, overwrite, (model_spec.FILE_NAME, TRACKER_FILE))
    source = MegatronReader(load, iteration)
    num_bytes = sum(source.num_bytes(piece) for piece in source.pieces)
    check_free_space(save, num_bytes)
    job = job_description(source.step_folder)
    with resumable_directory(save, job) as folder, progress_bar(num_bytes, save.name) as bar:
        write_checkpoint(folder, source.pieces, source.spec, lambda todo: map(source.read_piece, todo), bar)
        if (load / HF_FOLDER).is_dir():
            shutil.copytree(load / HF_FOLDER, folder / HF_FOLDER)
        origin = Origin.read(load) or Origin(None)
        replace(origin, copy_of=str(source.step_folder.resolve())).write(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="whole_checkpoint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder of a run")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--iteration", type=int, help="saved step to read (default: the latest)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint at --save")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    whole_checkpoint(args.load, args.save, args.iteration, args.overwrite)
    print(f"{args.save}: whole checkpoint of {args.load}")


if __name__ == "__main__":
    run_command(main)
