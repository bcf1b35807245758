"""A Megatron checkpoint folder seen through its family's table: the tensors under their Hugging Face names."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from checkpoint_convert.families import Piece, family_named, megatron_shape, pieces, sizes_of
from checkpoint_convert.torch_dist import TorchDistReader
from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_FOLDER = "hf"


@dataclass(frozen=True)
class _Place:
    piece: Piece
    part: int


class MegatronReader:
    """The model's tensors in a checkpoint folder, by the names they have in the stock HF class of `spec`.

    Whatever else is in the checkpoint (optimizer, random state) is left alone. UserError when the folder is no
    checkpoint, or a tensor is missing or has another shape than `spec` says.
    """

    def __init__(self, folder: Path, iteration: int | None = None):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        self.folder = folder
        self.spec = ModelSpec.read(folder)
        self.family = family_named(self.spec.family)
        self.step_folder = step_folder(folder, iteration)
        self._sizes = sizes_of(self.spec)
        self._reader = TorchDistReader(self.step_folder)
        self._places: dict[str, _Place] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for piece in pieces(self.family.table, self.spec):
            self._check_shape(piece)
            for part, (name, shape) in enumerate(zip(piece.hf_names, piece.hf_shapes, strict=True)):
                self._places[name] = _Place(piece, part)
                self._shapes[name] = shape

    @property
    def names(self) -> list[str]:
        """HF names in the order that reads every chunk of the checkpoint once."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor as the HF class has it, in the checkpoint's own dtype."""
        place = self._places[name]
        tensor = self._reader.read(place.piece.key, place.piece.stack_index)
        return place.piece.transform.to_hf(tensor, self._sizes)[place.part]

    def _check_shape(self, piece: Piece) -> None:
        found = self._reader.shape(piece.key)
        wanted = megatron_shape(piece, self.spec)
        # Megatron pads the vocabulary; the surplus rows are dropped.
        padded = piece.hf_shapes[0][0] == self._sizes["vocab"] and found[0] >= wanted[0] and found[1:] == wanted[1:]
        if found != wanted and not padded:
            raise UserError(
                f"{self.step_folder}: {piece.key} has shape {list(found)}, but model_spec.json says {list(wanted)}"
            )


def step_folder(folder: Path, iteration: int | None = None) -> Path:
    """The folder of one saved step: the one the tracker file names, or that of `iteration`."""
    if iteration is not None:
        chosen = folder / f"iter_{iteration:07d}"
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
    chosen = folder / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not chosen.is_dir():
        raise UserError(f"{tracker} names {chosen.name}, which is not there; name a saved one with --iteration")
    return chosen
