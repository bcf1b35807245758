"""How new experts and routers start: the weights of an upcycled model before training."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from checkpoint_convert.common.numbers import cast
from checkpoint_convert.hf.safetensors_reader import HfReader
from checkpoint_convert.hf.vocabulary_rows import with_new_rows
from moelpr.base.errors import UserError
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.model.families.tables import Piece, megatron_shape, sizes_of
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import VOCABULARY_PARTS, Part


@dataclass(frozen=True)
class Start:
    """How new experts and routers start."""

    # "copied" from the FFN (in an MoE, from expert 0), or "random": normal with the standard deviation
    # `initializer_range` of the model, an ablation of the paper
    new_experts: Literal["copied", "random"] = "copied"
    noise: float = 0.0  # standard deviation of the noise added to a copy, as a fraction of the copied tensor's own
    seed: int = 1234  # random seed. Each tensor has its own random stream, which depends on no other tensor
    # folder of a dense model whose FFNs new experts copy; None for those of the model itself
    ffns_of: str | None = None

    def check(self) -> None:
        if self.new_experts == "random" and self.noise:
            raise UserError("--new-experts random makes no copies; remove --expert-noise")


def starting_tensors(
    source: HfReader,
    ffns: HfReader,
    plan: list[Piece],
    spec: ModelSpec,
    start: Start,
    extension: VocabularyExtension | None,
) -> Iterator[Tensor]:
    """The Megatron tensor of every piece in the spec; an FFN, new experts' of `ffns`, is read once for all copies."""
    dtype = getattr(torch, spec.dtype)
    was_read: tuple[HfReader, tuple[str, ...]] = source, ()
    tensor = torch.empty(0)
    for piece in plan:
        is_new = piece.part is Part.NEW_EXPERTS
        if piece.part is Part.ROUTER:
            yield cast(_router(source, piece, spec, start.seed), dtype, piece.key)
        elif is_new and start.new_experts == "random":
            fresh, std = torch.empty(megatron_shape(piece, spec)[1:]), spec.megatron_args["init_method_std"]
            yield fresh.normal_(std=std, generator=_stream(start.seed, piece)).to(dtype)
        else:
            reader = ffns if is_new else source
            if (reader, piece.origin) != was_read:
                del tensor  # one in memory
                parts = [reader.read_finite(name) for name in piece.origin]
                if extension is not None and piece.part in VOCABULARY_PARTS:
                    parts = [with_new_rows(parts.pop(), extension, spec.megatron_args["vocab_size"], dtype)]
                tensor = cast(piece.transform.to_megatron(parts, sizes_of(spec)), dtype, piece.key)
                del parts
                was_read = reader, piece.origin
            yield _with_noise(tensor, piece, start) if is_new and start.noise else tensor


def _router(source: HfReader, piece: Piece, spec: ModelSpec, seed: int) -> Tensor:
    """Router rows [experts, hidden]: xavier-normal for a dense FFN, as any routing then computes the same.

    In an MoE, new experts start as copies of expert 0 and compete only with it: tokens whose top-k omits expert 0 are
    computed as before.
    """
    fresh = torch.nn.init.xavier_normal_(torch.empty(piece.hf_shapes[0]), generator=_stream(seed, piece))
    if not piece.origin:
        return fresh
    assert spec.moe is not None
    rows = source.read_finite(piece.origin[0]).float()
    # Expert 0's row plus a small random row, which decides which of the equal experts a token goes to.
    return torch.cat([rows, rows[:1] + 0.01 * fresh[spec.moe.num_original_places :]])


def _with_noise(tensor: Tensor, piece: Piece, start: Start) -> Tensor:
    changed, stream = tensor.to(torch.float32, copy=True), _stream(start.seed, piece)
    deviation = start.noise * changed.std().item()
    for rows in changed.split(1024):  # bounds the memory of the noise
        rows.add_(torch.randn(rows.shape, generator=stream), alpha=deviation)
    return changed.to(tensor.dtype)


def _stream(seed: int, piece: Piece) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {piece.key} {piece.expert or 0}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
