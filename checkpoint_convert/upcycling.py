"""What every tensor of an upcycled model starts from."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from checkpoint_convert.hf_folder import HfReader
from checkpoint_convert.outputs import refuse_not_finite
from moelpr.errors import UserError
from moelpr.families.tables import Piece, megatron_shape, sizes_of
from moelpr.model_spec import ModelSpec


@dataclass(frozen=True)
class Start:
    """How new experts and routers start.

    new_experts: "copied" from the FFN (or, beside other experts, from expert 0), or "random" (normal with the model's
        initializer_range; an ablation of the paper).
    noise: standard deviation of what is added to a copy, as a share of the copied tensor's own.
    reinitialise: share of a copy's FFN dimensions drawn anew (Drop-Upcycling, arXiv 2502.19261): gate and up rows and
        down columns of the same, randomly chosen dimensions, from a normal distribution with the mean and standard
        deviation of the entries they replace.
    seed: of all draws. Each tensor has a random stream of its own, so that no draw depends on order or on other layers.
    """

    new_experts: Literal["copied", "random"] = "copied"
    noise: float = 0.0
    reinitialise: float = 0.0
    seed: int = 1234

    def check(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise UserError(f"--expert-noise {self.noise} must be 0 or more; it's a share of the weights' deviation")
        if not 0 <= self.reinitialise <= 1:
            raise UserError(f"--reinitialise {self.reinitialise} must lie between 0 and 1; it's a share of the FFN")
        if self.new_experts == "random" and (self.noise or self.reinitialise):
            raise UserError(
                "--new-experts random copies nothing, so --expert-noise and --reinitialise have no use; drop them"
            )


def starting_tensors(source: HfReader, plan: list[Piece], spec: ModelSpec, start: Start) -> Iterator[Tensor]:
    """The Megatron tensor of every piece, in the model's dtype. Copies of an FFN follow each other: it's read once."""
    dtype = getattr(torch, spec.dtype)
    read_origin: tuple[str, ...] = ()
    tensor = torch.empty(0)
    for piece in plan:
        if piece.role == "router":
            yield _router(source, piece, spec, start.seed).to(dtype)
        elif piece.role == "new expert" and start.new_experts == "random":
            fresh = torch.empty(megatron_shape(piece, spec)[1:])
            yield fresh.normal_(std=spec.megatron_args["init_method_std"], generator=_stream(start.seed, piece)).to(
                dtype
            )
        else:
            if piece.origin != read_origin:
                del tensor  # one in memory
                parts = [_read(source, name) for name in piece.origin]
                tensor = piece.transform.to_megatron(parts, sizes_of(spec)).to(dtype)
                del parts
                read_origin = piece.origin
            yield _changed(tensor, piece, spec, start) if piece.role == "new expert" else tensor


# Beside other experts a new one starts with expert 0's row of the router and this share of a fresh draw, which decides
# which of the equal experts a token goes to.
_ROW_NOISE = 0.01


def _router(source: HfReader, piece: Piece, spec: ModelSpec, seed: int) -> Tensor:
    """Router rows [experts, hidden]: xavier-normal beside a dense FFN, where any routing computes the same.

    Beside other experts it doesn't. The new ones start as copies of expert 0 and compete with expert 0 alone: a token
    whose top-k is without it is computed as before.
    """
    fresh = torch.nn.init.xavier_normal_(torch.empty(piece.hf_shapes[0]), generator=_stream(seed, piece))
    if not piece.origin:
        return fresh
    assert spec.moe is not None
    rows = _read(source, piece.origin[0]).float()
    new_rows = rows[:1] + _ROW_NOISE * fresh[spec.moe.num_original_experts :]
    return torch.cat([rows, new_rows])


def _read(source: HfReader, name: str) -> Tensor:
    return refuse_not_finite(source.read(name), f"{source.folder}: {name}", "download the model again or take another")


def _changed(tensor: Tensor, piece: Piece, spec: ModelSpec, start: Start) -> Tensor:
    if start.noise == 0 and start.reinitialise == 0:
        return tensor
    changed = tensor.to(torch.float32, copy=True)
    stream = _stream(start.seed, piece)
    if start.noise:
        deviation = start.noise * changed.std().item()
        for rows in changed.split(1024):  # as much memory as a few rows need
            rows.add_(torch.randn(rows.shape, generator=stream), alpha=deviation)
    if start.reinitialise:
        dropped = _dropped_dimensions(start, piece, spec.megatron_args["ffn_hidden_size"])
        parts = piece.transform.to_hf(changed, sizes_of(spec))
        for matrix in parts if len(parts) == 2 else [parts[0].T]:  # gate and up, or down: views, an FFN dimension a row
            entries = matrix[dropped]
            fresh = torch.randn(entries.shape, generator=stream)
            matrix[dropped] = entries.mean() + entries.std() * fresh
    return changed.to(tensor.dtype)


def _dropped_dimensions(start: Start, piece: Piece, ffn: int) -> Tensor:
    """Of one layer and expert: the same for gate, up and down."""
    layer = piece.key.partition(".mlp.")[0]
    stream = _generator(f"{start.seed} {layer} {piece.expert} dropped")
    return torch.randperm(ffn, generator=stream)[: round(start.reinitialise * ffn)]


def _stream(seed: int, piece: Piece) -> torch.Generator:
    return _generator(f"{seed} {piece.key} {piece.expert or 0}")


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
