"""A Megatron checkpoint folder seen through its family's table: the tensors under their Hugging Face names."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.outputs import refuse_not_finite
from checkpoint_convert.torch_dist import TorchDistReader
from moelpr.checkpoints import checkpoint_chain, verify_chain
from moelpr.errors import UserError
from moelpr.families.families import family_named
from moelpr.families.tables import Piece, megatron_shape, pieces, sizes_of, zeros
from moelpr.model_spec import ModelSpec


@dataclass(frozen=True)
class _Place:
    piece: Piece
    part: int


class MegatronReader:
    """The model's tensors in a checkpoint folder, by the names they have in the stock HF class of `spec`.

    A tensor that the checkpoint leaves out is read from its base (see moelpr.checkpoints), whose checksum is
    verified first. Whatever else is in the checkpoint (optimizer, random state) is left alone. UserError when the
    folder is no checkpoint, a base is gone or has changed, or a tensor is missing or not of the shape `spec` says.
    """

    def __init__(self, folder: Path, iteration: int | None = None):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        self.folder = folder
        self.spec = ModelSpec.read(folder)
        self.family = family_named(self.spec.family)
        links = checkpoint_chain(folder, iteration)
        self.step_folder = links[0]
        verify_chain(links)
        self.pieces = list(pieces(self.family.table, self.spec))
        self._sizes = sizes_of(self.spec)
        readers = [TorchDistReader(link) for link in links]
        self._whole = readers[-1]
        self._reader_of = {key: reader for reader in reversed(readers) for key in reader.keys}
        self._places: dict[str, _Place] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces:
            self._check_shape(piece)
            for part, (name, shape) in enumerate(zip(piece.hf_names, piece.hf_shapes, strict=True)):
                self._places[name] = _Place(piece, part)
                self._shapes[name] = shape
        # What the HF class has beyond our model.
        self._shapes |= dict(zeros(self.family.table, self.spec))

    @property
    def names(self) -> list[str]:
        """HF names in the order that reads every chunk of the checkpoint once."""
        return list(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor as the HF class has it, in the checkpoint's own dtype."""
        if name not in self._places:
            return torch.zeros(self._shapes[name])
        place = self._places[name]
        tensor = self._reader(place.piece.key).read(place.piece.key, place.piece.stack_index)
        return place.piece.transform.to_hf(tensor, self._sizes)[place.part]

    def read_finite(self, name: str) -> Tensor:
        """Like `read`; UserError where a weight is NaN or infinite."""
        remedy = "the run has diverged, so export an earlier step with --iteration"
        return refuse_not_finite(self.read(name), f"{self.step_folder}: {name}", remedy)

    def read_piece(self, piece: Piece) -> Tensor:
        """One piece as Megatron has it, without padding of the vocabulary."""
        tensor = self._reader(piece.key).read(piece.key, piece.stack_index)
        return tensor if piece.stack_index is not None else tensor[: megatron_shape(piece, self.spec)[0]]

    def num_bytes(self, piece: Piece) -> int:
        """Size of one piece in the checkpoint's own dtype."""
        return self._reader(piece.key).dtype(piece.key).itemsize * sum(map(math.prod, piece.hf_shapes))

    def _reader(self, key: str) -> TorchDistReader:
        return self._reader_of.get(key, self._whole)  # what is nowhere is missed in the one that should be whole

    def _check_shape(self, piece: Piece) -> None:
        found = self._reader(piece.key).shape(piece.key)
        wanted = megatron_shape(piece, self.spec)
        # Megatron pads the vocabulary; the surplus rows are dropped.
        padded = piece.hf_shapes[0][0] == self._sizes["vocab"] and found[0] >= wanted[0] and found[1:] == wanted[1:]
        if found != wanted and not padded:
            raise UserError(
                f"{self.step_folder}: {piece.key} has shape {list(found)}, but model_spec.json says {list(wanted)}"
            )
