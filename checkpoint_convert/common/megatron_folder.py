"""Megatron checkpoint folders: tensors read under their Hugging Face names, and release checkpoints written."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.common.numbers import check_finite
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.journal import Journal
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.model.checkpoints.chain import RELEASE, checkpoint_chain, verify_chain
from moelpr.model.checkpoints.torch_dist import TorchDistReader, TorchDistWriter
from moelpr.model.families.families import family_named
from moelpr.model.families.moe_classes import MoeClass
from moelpr.model.families.tables import GateUp, Piece, megatron_shape, pieces, sizes_of, zeros
from moelpr.model.model_spec import FILE_NAME, ModelSpec

# Files of which a checkpoint folder that may be overwritten has at least one.
SIGNS = (FILE_NAME, TRACKER_FILE)


class MegatronReader:
    """The model in a checkpoint folder, with the tensor names of its stock Hugging Face class.

    Tensors that the checkpoint omits are read from its base (moelpr.model.checkpoints.chain), whose checksum is
    verified first. Everything else in the checkpoint (optimizer, random state) is ignored.

    Args:
        iteration: Saved step to read; None for the latest.
        moe_class: Whose tensor names an upcycled model gets; None for the family's default.

    Raises:
        UserError: `folder` is not a checkpoint, a base is missing or has changed, or a tensor is missing or misshapen.
    """

    def __init__(
        self,
        folder: Path,
        iteration: int | None = None,
        moe_class: MoeClass | None = None,
        verify: Verify = Verify.FULL,
    ):
        self.folder = folder
        self.spec = ModelSpec.read(folder)
        self.family = family_named(self.spec.family)
        if moe_class is not None:
            self.family = self.family.written_as(moe_class)
        links = checkpoint_chain(folder, iteration)
        self.step_folder = links[0]
        verify_chain(links, verify)
        self.pieces = list(pieces(self.family.table, self.spec))
        self._sizes = sizes_of(self.spec)
        readers = [TorchDistReader(link, verify) for link in links]
        self._complete = readers[-1]
        self._reader_of = {key: reader for reader in reversed(readers) for key in reader.keys}
        self._places: dict[str, tuple[Piece, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces:
            self._check_shape(piece)
            for names in piece.places:
                for part, (name, shape) in enumerate(zip(names, piece.hf_shapes, strict=True)):
                    self._places[name] = piece, part
                    self._shapes[name] = shape
        self._shapes |= dict(zeros(self.family.table, self.spec))  # only the HF class has these

    @property
    def names(self) -> list[str]:
        """HF names in the order that reads each chunk of the checkpoint once."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor of the HF class in the checkpoint's dtype."""
        if name not in self._places:
            return torch.zeros(self._shapes[name])
        piece, part = self._places[name]
        return piece.transform.to_hf(self.read_piece(piece), self._sizes)[part]

    def read_finite(self, name: str) -> Tensor:
        """Like `read`, but UserError if the tensor contains NaN or Inf."""
        fix = "the run has diverged, so export an earlier step with --iteration"
        return check_finite(self.read(name), f"{self.step_folder}: {name}", fix)

    def read_piece(self, piece: Piece) -> Tensor:
        """Read one Megatron tensor, or slice of a stack, without padding of the vocabulary."""
        tensor = self._reader(piece).read(piece.key, piece.stack_index)
        return tensor if piece.stack_index is not None else tensor[: megatron_shape(piece, self.spec)[0]]

    def _reader(self, piece: Piece) -> TorchDistReader:
        return self._reader_of.get(piece.key, self._complete)  # the base, which is complete, reports missing keys

    def _check_shape(self, piece: Piece) -> None:
        shape, expected = self._reader(piece).shape(piece.key), megatron_shape(piece, self.spec)
        # Megatron pads the vocabulary; the padding is ignored.
        is_vocabulary = piece.hf_shapes[0][0] == self._sizes["vocab"]
        if shape != expected and not (is_vocabulary and shape[0] >= expected[0] and shape[1:] == expected[1:]):
            raise UserError(
                f"{self.step_folder}: {piece.key} has shape {list(shape)}, but {FILE_NAME} says {list(expected)}"
            )


def write_checkpoint(
    journal: Journal,
    plan: list[Piece],
    spec: ModelSpec,
    read: Callable[[list[Piece]], Iterable[Tensor]],
    bar: "tqdm[None]",
) -> None:
    """Write a release checkpoint and model_spec.json, or resume an interrupted one; one tensor is in memory at a time.

    Args:
        journal: The journal of the folder to write.
        read: Returns the Megatron tensors of the given pieces, in their order.
    """
    with TorchDistWriter(journal.folder / RELEASE, journal) as writer:
        missing = [piece for piece in plan if not writer.is_written(piece.key, _offsets(piece)[-1])]
        bar.update(round(bar.total * (1 - num_elements(missing) / num_elements(plan))))
        tensors = iter(read(missing))
        for piece in missing:
            tensor = next(tensors)
            for offsets, chunk in zip(_offsets(piece), tensor.chunk(len(_offsets(piece))), strict=True):
                if not writer.is_written(piece.key, offsets):
                    part = chunk if piece.stack_index is None else chunk.unsqueeze(0)
                    writer.write(piece.key, part, megatron_shape(piece, spec), offsets)
            bar.update(tensor.nbytes)
            del tensor, chunk, part  # one in memory
        for key in _extra_state_keys(plan):
            writer.write_object(key, None)
        writer.finish(_COMMON_STATE)
    spec.write(journal.folder)
    (journal.folder / TRACKER_FILE).write_text(RELEASE)


# The non-tensor state that Megatron's load_checkpoint reads from a release checkpoint.
_COMMON_STATE: dict[str, Any] = {
    "checkpoint_version": 3.0,  # below 2.0 Megatron would reorder the rows of query, key and value
    "iteration": 0,
    # One key per layer, as a model may have both MoE and dense layers.
    "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
}


def num_elements(plan: list[Piece]) -> int:
    """Number of elements of all pieces."""
    return sum(math.prod(shape) for piece in plan for shape in piece.hf_shapes)


def _offsets(piece: Piece) -> list[tuple[int, ...]]:
    """Offsets of the piece's chunks in its Megatron tensor: gate and up apart, as Megatron loads each on its own."""
    rows = [0, piece.hf_shapes[0][0]] if isinstance(piece.transform, GateUp) else [0]
    stack = [] if piece.stack_index is None else [piece.stack_index]
    return [(*stack, row, *[0] * (len(piece.hf_shapes[0]) - 1)) for row in rows]


def _extra_state_keys(plan: list[Piece]) -> list[str]:
    """Names of the (empty) module states that Megatron's layers load; FP8 keeps its scales there."""
    modules: dict[str, None] = {}
    for piece in plan:
        module = piece.key.rpartition(".")[0]
        modules[module] = None
        if module.endswith(".linear_qkv"):
            modules[module.removesuffix("linear_qkv") + "core_attention"] = None
    return [f"{module}._extra_state" for module in modules]
