"""Add an instruct difference to a model that was upcycled from the same base.

    θ = θ_M + s · (θ_I − θ_B)

for the model M, its dense base B, the instruct model I that someone made of B, and the scale s. Every expert gets the
difference of the FFN. Routers, which B and I lack, stay as they are.

Training left everything but routers and new experts as it is in B, so there θ = θ_I with s = 1: the path through the
original expert becomes the instruct model. Rows of new tokens, which B and I lack, also stay as they are.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_convert.card.graft_record import PARTS, Only
from checkpoint_convert.common.numbers import CHUNK_ELEMENTS, cast, check_finite
from checkpoint_convert.conversions.model_pairs import Described, open_tensors, pieces_since
from checkpoint_convert.hf.checks import check_weights
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from checkpoint_convert.hf.vocabulary_rows import grow, new_rows, shape_without
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.model.families.families import FREE_ARGS, check_settings
from moelpr.model.families.hf_config import check_model
from moelpr.model.families.tables import Piece, pieces
from moelpr.model.stages import VOCABULARY_PARTS

_REMEDY = "pass a base with the instruct model and the upcycled model that were made of it"


class GraftReader:
    """The model with the difference, tensor by tensor.

    Attributes:
        names: Names of the model's tensors, in its order.
        new_rows: The rows of new tokens in embedding and output layer.

    Raises:
        UserError: the models do not fit each other; on access also, if a tensor that training leaves as it is differs
            from the base's, or the instruct model's has nothing in common with it.
    """

    def __init__(
        self,
        base: Path,
        instruct: Path,
        model: Path,
        scale: float = 1.0,
        only: Only = "all",
        dtype: str | None = None,
        verify: Verify = Verify.FULL,
    ) -> None:
        self._base, of_base = _open(base, verify)
        self._instruct, of_instruct = _open(instruct, verify)
        self._model, of_model = _open(model, verify)
        base_spec, instruct_spec, spec = of_base.spec, of_instruct.spec, of_model.spec
        if spec.moe is None:
            raise UserError(f"{model} is dense; pass the export of a model that was upcycled from {base} as --model")
        for reader, dense in ((self._base, base_spec), (self._instruct, instruct_spec)):
            if dense.moe is not None:
                raise UserError(f"{reader.folder} is an MoE; pass the dense model that {model} was upcycled from")
        _, plan = pieces_since(of_base, of_model)
        self.new_rows = new_rows(base, model)
        self._model.list_parts(name for piece in plan for names in piece.places for name in names)
        self.names = self._model.names
        # Name in the model → name in base and instruct model, and the piece that it belongs to.
        self._sources: dict[str, tuple[str, Piece]] = {}
        for piece in plan:
            for names in piece.places if piece.origin else ():
                self._sources.update(zip(names, ((origin, piece) for origin in piece.origin), strict=True))
        self._check_shapes()
        check_settings(self._base.folder, base_spec, instruct, instruct_spec, _REMEDY, FREE_ARGS)
        # The shapes show whether the vocabulary has grown by the new tokens.
        shape = spec.megatron_args | {"vocab_size": base_spec.megatron_args["vocab_size"]}
        same_rows = replace(spec, megatron_args=shape)
        check_settings(self._base.folder, base_spec, model, same_rows, _REMEDY, FREE_ARGS)
        self._scale, self._parts = scale, PARTS[only]
        self.dtype = dtype or common_dtype((self._model, name) for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._model.shape(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor of the graft in its dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        tensor = self._model.read_finite(name)
        if name not in self._sources:
            return cast(tensor, dtype, name)
        origin, piece = self._sources[name]
        is_grafted = piece.part in self._parts
        if piece.is_trained and not is_grafted:
            return cast(tensor, dtype, name)
        base = self._read_dense(self._base, origin, tensor, piece)
        if not piece.is_trained and not torch.equal(base.to(tensor.dtype), tensor):
            for name_of_dtype in ("bfloat16", "float16"):
                if torch.equal(base.to(getattr(torch, name_of_dtype)).to(tensor.dtype), tensor):
                    raise UserError(
                        f"{self._model.folder} was trained in {name_of_dtype}, which rounded the base's weights, but "
                        f"is stored in another dtype; export it again with moelpr model export --dtype {name_of_dtype}"
                    )
            raise UserError(
                f"{self._base.folder} is not the base of {self._model.folder}: its {origin} differs from {name}, which "
                "training leaves as it is; pass the model that was upcycled (after --train-everything, there is none)"
            )
        if not is_grafted:
            return cast(tensor, dtype, name)
        instruct = self._read_dense(self._instruct, origin, tensor, piece)
        # Post-training moves a matrix by a small part of its norm; two unrelated ones are √2 norms apart.
        if not piece.is_trained and instruct.ndim == 2 and _norm(base, instruct) > _norm(base):
            raise UserError(
                f"{self._instruct.folder} was not made of {self._base.folder}: their {origin} differ by more than the "
                "norm of the base's; pass the base's own instruct model"
            )
        grafted = add_difference(tensor, base, instruct, self._scale, dtype)
        return check_finite(grafted, f"{name} with the difference", f"{self.dtype} is too narrow; pass another --dtype")

    def _rows(self, piece: Piece) -> range:
        """The rows of the piece that base and instruct model lack."""
        return self.new_rows if piece.part in VOCABULARY_PARTS else range(0)

    def _read_dense(self, reader: HfReader, name: str, model: Tensor, piece: Piece) -> Tensor:
        """A tensor of base or instruct model; rows of new tokens are the model's own, so that their difference is 0."""
        tensor, rows = reader.read_finite(name), self._rows(piece)
        return grow(tensor, model[rows.start : rows.stop], rows) if rows else tensor

    def _check_shapes(self) -> None:
        base, instruct, model = self._base, self._instruct, self._model
        for name in base.names:
            if name not in instruct or instruct.shape(name) != base.shape(name):
                shape = list(instruct.shape(name)) if name in instruct else "missing"
                raise UserError(
                    f"{name} has shape {list(base.shape(name))} in {base.folder}, but is {shape} in {instruct.folder}; "
                    "pass the base's own instruct model, with the same vocabulary"
                )
        for name, (origin, piece) in self._sources.items():
            rows = self._rows(piece)
            if origin not in base or shape_without(base.shape(origin), rows) != shape_without(model.shape(name), rows):
                shape = list(base.shape(origin)) if origin in base else "missing"
                raise UserError(
                    f"{name} has shape {list(model.shape(name))} in {model.folder}, but the {origin} that it comes "
                    f"from is {shape} in {base.folder}; pass the model that was upcycled as --base"
                )


def add_difference(model: Tensor, base: Tensor, instruct: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """model + scale · (instruct − base) in `dtype`, computed in fp64.

    Even fp64 rounds the sum, so with scale 1 an element of the model that equals the base's (rounded to the model's
    dtype) becomes the instruct model's own.
    """
    result = torch.empty(model.shape, dtype=dtype)
    tensors = (result, model, base, instruct)
    for out, m, b, i in zip(*(tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in tensors), strict=True):
        total = m.double() + scale * (i.double() - b.double())
        out.copy_(torch.where(m == b.to(m.dtype), i.double(), total) if scale == 1 else total)
    return result


def _open(folder: Path, verify: Verify) -> tuple[HfReader, Described]:
    check_model(folder, is_hf=True)
    model = Described.read(folder)
    reader = open_tensors(folder, verify=verify)
    assert isinstance(reader, HfReader)
    check_weights(reader, model.family, model.spec, list(pieces(model.family.table, model.spec)))
    return reader, model


def _norm(a: Tensor, b: Tensor | None = None) -> float:
    """Frobenius norm of a, or of a − b."""
    parts = [tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in (a, b) if tensor is not None]
    chunks = (x.double() if not rest else x.double() - rest[0].double() for x, *rest in zip(*parts, strict=True))
    return sum(chunk.square().sum().item() for chunk in chunks) ** 0.5
