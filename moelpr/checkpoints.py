"""Which saved steps hold a model's weights: one folder, or a chain of them where runs saved only what they trained.

A run with `--save-trained-only` keeps `base_checkpoint.json` beside its checkpoints: the step folder that holds the
rest, and its checksum. The base may itself be such a run, so a model is read from a chain, newest link first: routers
of stage 2, then new experts of stage 1, then the upcycled model. A tensor is read from the first link that has it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moelpr.errors import UserError
from moelpr.files import atomic_file
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import BASE_CHECKPOINT_FILE, TRACKER_FILE

FORMAT_VERSION = 1
RELEASE = "release"

# Files are hashed in pieces of this size, so that ranks and threads share a large one. Part of the format.
PIECE_BYTES = 256 << 20
_READ_BYTES = 256 << 10


@dataclass(frozen=True)
class BaseCheckpoint:
    """What `base_checkpoint.json` says about the checkpoint that holds the frozen tensors.

    folder: the base's folder, relative to the folder of the JSON file (or absolute).
    absolute_folder: where it was when this was written; looked at where `folder` leads to nothing.
    step: the step folder in it, "release" or "iter_0000500".
    sha256: `checksum` of that step folder.
    """

    folder: str
    absolute_folder: str
    step: str
    sha256: str

    @classmethod
    def of(cls, step_folder: Path, sha256: str, save: Path) -> "BaseCheckpoint":
        """The record of `step_folder` as seen from the run's folder `save`."""
        base = step_folder.parent.resolve()  # a step folder may be a symbolic link
        return cls(os.path.relpath(base, save.resolve()), str(base), step_folder.name, sha256)

    def write(self, folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **vars(self)}
        with atomic_file(folder / BASE_CHECKPOINT_FILE) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "BaseCheckpoint | None":
        """What `folder`/base_checkpoint.json says; None where a folder has none, as its checkpoints are whole."""
        path = folder / BASE_CHECKPOINT_FILE
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            version = content.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise UserError(f"format_version is {version}, this program reads {FORMAT_VERSION}")
            base = cls(**content)
            if not all(isinstance(value, str) for value in vars(base).values()):
                raise UserError("every field must be text")
            if base.step != RELEASE and not re.fullmatch(r"iter_\d+", base.step):
                raise UserError(f"step is {base.step!r}, neither {RELEASE!r} nor like 'iter_0000500'")
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged or from another program: {error}") from error
        return base

    def find(self, folder: Path, elsewhere: Path | None = None) -> Path:
        """The base's step folder, first looked for in `elsewhere`, then where the file in `folder` says.

        Raises:
            UserError: it is in none of these places.
        """
        places = [folder / self.folder, Path(self.absolute_folder)]
        for place in ([elsewhere] if elsewhere else []) + places:
            if (place / self.step).is_dir():
                # without resolve(), a step folder that is a symbolic link would lose its model_spec.json
                return Path(os.path.normpath(place)) / self.step
        raise UserError(
            f"the checkpoints in {folder} hold only what was trained; the rest, {self.step} of their base checkpoint, "
            f"is gone: looked in {' and '.join(dict.fromkeys(str(place.resolve()) for place in places))}. "
            f'Bring it back, or write its new place into "folder" of {folder / BASE_CHECKPOINT_FILE}'
        )


def step_name(iteration: int) -> str:
    """The name of the folder that holds the step `iteration`."""
    return f"iter_{iteration:07d}"


def step_folder(folder: Path, iteration: int | None = None) -> Path:
    """The folder of one saved step: the one the tracker file names, or that of `iteration`."""
    if iteration is not None:
        chosen = folder / step_name(iteration)
        if not chosen.is_dir():
            saved = sorted(int(path.name[5:]) for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name))
            raise UserError(
                f"{folder} has no checkpoint of iteration {iteration}; "
                f"it holds {', '.join(map(str, saved)) if saved else 'no numbered ones'}"
            )
        return chosen
    tracker = folder / TRACKER_FILE
    if not tracker.is_file():
        raise UserError(f"{folder} is no Megatron checkpoint folder or an incomplete one: {TRACKER_FILE} is missing")
    text = tracker.read_text().strip()
    if text != RELEASE and not text.isdecimal():
        raise UserError(f"{tracker} says {text!r}; expected an iteration or '{RELEASE}'")
    chosen = folder / (RELEASE if text == RELEASE else step_name(int(text)))
    if not chosen.is_dir():
        raise UserError(
            f"{tracker} names {chosen.name}, which is not there; choose one with --iteration (trainer: --ckpt-step)"
        )
    return chosen


def checkpoint_chain(folder: Path, iteration: int | None = None, base: Path | None = None) -> list[Path]:
    """The step folders that together hold the model of checkpoint folder `folder`, newest first.

    Args:
        iteration: saved step of `folder`; None for the latest.
        base: where the first base may be, if it is not where base_checkpoint.json says.

    Raises:
        UserError: no checkpoint, a base is gone or of another model, or the chain leads in a circle.
    """
    spec = ModelSpec.read(folder)
    links = [step_folder(folder, iteration)]
    while (record := BaseCheckpoint.read(links[-1].parent)) is not None:
        link = record.find(links[-1].parent, base)
        base = None
        if any(link.samefile(other) for other in links):
            raise UserError(
                f"{links[-1].parent / BASE_CHECKPOINT_FILE} leads in a circle: {link} rests on itself; "
                f'correct its "folder" and "step"'
            )
        if ModelSpec.read(link.parent) != spec:
            raise UserError(
                f"{link.parent} holds another model than {folder}, whose base checkpoint it should be: their "
                f'model_spec.json differ; correct "folder" in {links[-1].parent / BASE_CHECKPOINT_FILE}'
            )
        links.append(link)
    return links


def verify_chain(links: list[Path]) -> None:
    """Compare every base in the chain with the checksum its successor recorded.

    Reads the bases whole; where torch.distributed is up, every rank must call this, and the ranks share the work.

    Raises:
        UserError: a base has changed.
    """
    for link, base in zip(links, links[1:], strict=False):
        record = BaseCheckpoint.read(link.parent)
        if record is None or checksum(base) != record.sha256:
            raise UserError(
                f"{base} is not what the checkpoints in {link.parent} were trained on: its checksum differs from the "
                f"one in {BASE_CHECKPOINT_FILE}; bring the original back (a copy of it, or train again)"
            )


def checksum(step_folder: Path) -> str:
    """SHA-256 over names, sizes and contents of a step folder's files, and over its own base's checksum if it has one.

    Where torch.distributed is up, every rank must call this; each hashes its share.

    Raises:
        UserError: a file can't be read.
    """
    files = sorted((path.relative_to(step_folder).as_posix(), path) for path in step_folder.rglob("*"))
    pieces = [
        (name, path.stat().st_size, start, path)
        for name, path in files
        if path.is_file()
        for start in range(0, max(path.stat().st_size, 1), PIECE_BYTES)
    ]
    rank, world = _rank_and_world()
    mine = pieces[rank::world]
    total = sum(min(PIECE_BYTES, size - start) for _, size, start, _ in mine)
    with tqdm(
        total=total, desc=f"checksum of {step_folder}", unit="B", unit_scale=True, delay=2, disable=rank > 0 or None
    ) as bar:
        # hashlib works outside Python's lock
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(lambda piece: _digest(piece[3], piece[2], bar), mine))
    record = BaseCheckpoint.read(step_folder.parent)
    whole = hashlib.sha256((record.sha256 if record else "").encode())
    for (name, size, start, path), digest in zip(pieces, _interleave(digests, world), strict=True):
        if digest is None:
            raise UserError(f"{path} can't be read; check the disk and its permissions")
        whole.update(f"\n{name} {size} {start} {digest}".encode())
    return whole.hexdigest()


def _digest(path: Path, start: int, bar: "tqdm[None]") -> str | None:
    """The SHA-256 of one piece; None where it can't be read, as one rank alone must not leave the others waiting."""
    digest, left = hashlib.sha256(), PIECE_BYTES
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while left and (num_read := file.readinto(buffer[:left])):
                digest.update(buffer[:num_read])
                bar.update(num_read)
                left -= num_read
    except OSError:
        return None
    return digest.hexdigest()


def _rank_and_world() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _interleave(mine: list[str | None], world: int) -> Iterator[str | None]:
    """Everybody's digests in the order of the pieces, which were dealt out in turn."""
    shares: list[list[str | None]] = [mine]
    if world > 1:
        shares = [[] for _ in range(world)]
        torch.distributed.all_gather_object(shares, mine)
    for index in range(sum(map(len, shares))):
        yield shares[index % world][index // world]
