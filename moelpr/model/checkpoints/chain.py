"""The saved steps that contain a model's weights: one folder, or a chain of runs that saved only what they trained.

A run with `--save-trained-only` writes `base_checkpoint.json` next to its checkpoints: the step folder that contains
the other tensors, and its checksum. The base may itself be such a run, so a model is read from a chain, newest link
first: stage 2's routers, stage 1's new experts, the upcycled model. A tensor is read from the first link that has it.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic.dataclasses import dataclass

from moelpr.base import checksums, ranks
from moelpr.base.checksums import FileSum, Pieces, Verify
from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record
from moelpr.base.run_folder import BASE_CHECKPOINT_FILE, TABLE_FILES, TRACKER_FILE, as_step
from moelpr.model.model_spec import ModelSpec

RELEASE = "release"


@dataclass(frozen=True, config=STRICT)
class BaseCheckpoint(Record):
    """The base of checkpoints that contain only trained tensors: the step folder that has the frozen ones.

    Attributes:
        folder: The base's folder, relative to the folder of the file, or absolute.
        absolute_folder: Where the base was when the file was written; used if `folder` does not exist.
        step: The step folder in it, "release" or for example "iter_0000500".
        sha256: `checksum` of that step folder.
    """

    FILE_NAME: ClassVar[str] = BASE_CHECKPOINT_FILE
    REMEDY: ClassVar[str] = "restore the file"

    folder: str
    absolute_folder: str
    step: str
    sha256: str

    def __post_init__(self) -> None:
        if "\0" in self.folder + self.absolute_folder:
            raise UserError("a path can't contain NUL")
        if self.step != RELEASE and not re.fullmatch(r"iter_\d+", self.step):
            raise UserError(f"step must be {RELEASE!r} or like 'iter_0000500', got {self.step!r}")

    @classmethod
    def of(cls, step_folder: Path, sha256: str, save: Path) -> Self:
        """The record of `step_folder` for the run folder `save`."""
        base = step_folder.parent.resolve()  # a step folder may be a symbolic link
        return cls(os.path.relpath(base, save.resolve()), str(base), step_folder.name, sha256)

    def find(self, folder: Path, override: Path | None = None) -> Path:
        """The base's step folder: in `override`, or where the JSON file in `folder` says."""
        recorded = [folder / self.folder, Path(self.absolute_folder)]
        for place in ([override] if override else []) + recorded:
            if (place / self.step).is_dir():
                # without resolve(), or a step folder that is a symbolic link would lose its model_spec.json
                return Path(os.path.normpath(place)) / self.step
        searched = " and ".join(dict.fromkeys(str(place.resolve()) for place in recorded))
        raise UserError(
            f"the checkpoints in {folder} contain only trained tensors, and their base checkpoint {self.step} is "
            f'missing from {searched}; restore it, or write its new folder into "folder" of '
            f"{folder / BASE_CHECKPOINT_FILE}"
        )


def step_name(iteration: int) -> str:
    """The name of the folder of a saved step."""
    return f"iter_{iteration:07d}"


def step_folder(folder: Path, iteration: int | None = None) -> Path:
    """The folder of a saved step; by default of the latest, which the tracker file names."""
    if iteration is not None:
        chosen = folder / step_name(iteration)
        if not chosen.is_dir():
            saved = sorted(int(path.name[5:]) for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name))
            steps = " or ".join(map(str, saved))
            fix = f"pass --iteration {steps} (trainer: --ckpt-step)" if saved else "it has no numbered ones, so omit it"
            raise UserError(f"{folder} has no checkpoint of iteration {iteration}; {fix}")
        return chosen
    tracker = folder / TRACKER_FILE
    if not tracker.is_file():
        raise UserError(f"{folder} is not a complete Megatron checkpoint: {TRACKER_FILE} is missing")
    text = tracker.read_text(errors="replace").strip()
    step = as_step(text)
    if text != RELEASE and step is None:
        raise UserError(f"{tracker} must contain an iteration or '{RELEASE}', got {text[:40]!r}")
    chosen = folder / (RELEASE if step is None else step_name(step))
    if not chosen.is_dir():
        raise UserError(
            f"{tracker} names {chosen.name}, which is missing; choose a step with --iteration (trainer: --ckpt-step)"
        )
    return chosen


def checkpoint_chain(folder: Path, iteration: int | None = None, base: Path | None = None) -> list[Path]:
    """The step folders that together contain the model of checkpoint folder `folder`, newest first.

    Args:
        iteration: saved step of `folder`; None for the latest.
        base: where the first base may be, if it is not where base_checkpoint.json says.

    Raises:
        UserError: The checkpoint does not exist, a base is missing or of another model, or the chain is circular.
    """
    spec = ModelSpec.read(folder)
    links = [step_folder(folder, iteration)]
    while (record := BaseCheckpoint.read_if_there(links[-1].parent)) is not None:
        link = record.find(links[-1].parent, base)
        record_file = links[-1].parent / BASE_CHECKPOINT_FILE
        base = None
        if any(link.samefile(other) for other in links):
            raise UserError(f'{record_file} is circular: {link} depends on itself; correct its "folder" and "step"')
        if ModelSpec.read(link.parent) != spec:
            raise UserError(
                f"{link.parent} contains another model than {folder}, whose base it should be: their model_spec.json "
                f'differ; correct "folder" in {record_file}'
            )
        links.append(link)
    return links


def verify_chain(links: list[Path], verify: Verify = Verify.FULL) -> None:
    """Compare every base in the chain with the checksum that its successor recorded.

    A base without checksums.json is an error, unless files are trusted.
    """
    for link, base in zip(links, links[1:], strict=False):
        if verify is Verify.NONE and not (base / checksums.FILE_NAME).is_file():
            continue
        record = BaseCheckpoint.read_if_there(link.parent)
        if record is None or checksum(base) != record.sha256:
            raise UserError(
                f"{base} is not what the checkpoints in {link.parent} were trained on: its checksum differs from the "
                f"one in {BASE_CHECKPOINT_FILE}; restore the original, or train again"
            )


def verify_step(step_folder: Path, pieces: Pieces, verify: Verify = Verify.FULL) -> None:
    """Compare all files of a step folder with its checksums.json, unless they are trusted.

    If torch.distributed is initialized, every rank must call this, with the pieces of files that it has read.
    """
    if verify is not Verify.NONE:
        fix = "copy the checkpoint again, or use another step (trainer: --ckpt-step)"
        checksums.verify_folder(step_folder, fix, is_expected=True, pieces=pieces)


def write_checksums(step_folder: Path, known: Mapping[str, FileSum] | None = None) -> None:
    """Write checksums.json of a step that all ranks have saved. Every rank must call this.

    Each rank reads the files that it wrote, which its machine still has in memory, and whose sums are not `known`.
    OSError if a file can't be read, or has not the known size.
    """
    known = known or {}
    rank, world = ranks.rank(), ranks.world_size()
    names = [path.name for path in step_folder.iterdir() if path.suffix == ".distcp" or path.name in TABLE_FILES]
    writers = {name: int(rank_of[1]) for name in names if (rank_of := re.match(r"__(\d+)_", name))}
    own = [name for name in names if (writers[name] if writers.get(name, world) < world else 0) == rank]
    own_sums = checksums.sums_of(step_folder, {name: set() for name in own if name not in known})
    for name in known.keys() & set(own):
        own_sums[name] = known[name] if (step_folder / name).stat().st_size == known[name].num_bytes else None
    sums = {name: of_file for part in ranks.gather(own_sums) for name, of_file in part.items()}
    complete = {name: of_file for name, of_file in sums.items() if of_file is not None}
    if unread := sums.keys() - complete.keys():
        raise OSError(f"{step_folder / min(unread)} can't be read although it was just saved; check the disk")
    if rank == 0:
        checksums.write(step_folder, complete)


def checksum(step_folder: Path) -> str:
    """SHA-256 over a step folder's checksums.json, and over its own base's checksum if it has one."""
    if not (sums := step_folder / checksums.FILE_NAME).is_file():
        raise UserError(
            f"{step_folder} has no {checksums.FILE_NAME}, by which runs with --save-trained-only know their base; "
            "restore it, or convert the model again"
        )
    record = BaseCheckpoint.read_if_there(step_folder.parent)
    return hashlib.sha256((record.sha256 if record else "").encode() + sums.read_bytes()).hexdigest()
