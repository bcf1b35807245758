"""The output folder of every converter: complete or not at all, resumable, with a progress bar."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from moelpr.base.errors import UserError
from moelpr.base.files import refuse_existing
from moelpr.base.journal import Journal, partial_name, resumable_directory
from moelpr.base.model_code import drop_code


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
    if save.exists() and not (
        save.is_dir() and (any((save / sign).is_file() for sign in signs) or not os.listdir(save))
    ):
        raise UserError(f"{save} is not an output of this command and is not overwritten; choose another --save")


@contextmanager
def output_folder(
    save: Path, overwrite: bool, num_bytes: int, sources: list[Path], **settings: object
) -> Iterator[tuple[Path, Journal, "tqdm[None]"]]:
    """Yield a temporary folder that becomes `save` on success, its journal, and a progress bar in bytes.

    Args:
        overwrite: Whether it may replace an existing folder.
        num_bytes: Size of the weights; if the disk has less space than is missing, nothing is written.
        sources: Input folders; an interrupted conversion resumes if their files and `settings` are unchanged.
    """
    parent = save.resolve().parent
    while not parent.exists():
        parent = parent.parent
    # Files of an interrupted conversion are kept or replaced.
    left = sum(path.stat().st_size for path in partial_name(save.resolve()).rglob("*") if path.is_file())
    if shutil.disk_usage(parent).free < num_bytes - left:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(save))
    files = [path for source in sources for path in sorted(source.rglob("*")) if path.is_file()]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    with (
        resumable_directory(save, {"files": states, **settings}) as journal,
        tqdm(total=num_bytes, desc=save.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        refuse_existing([save], overwrite)  # again: a job that started before may just have ended
        yield journal.folder, journal, bar
        drop_code(journal.folder)
