"""New experts part of the way back to the original one: less is learned, and less of the base is changed.

The mean of the weights of a model and of what was trained from it (WiSE-FT, arXiv 2109.01903), of new experts alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from checkpoint_convert.mcore.megatron_folder import MegatronReader
from moelpr.base.errors import UserError
from moelpr.model.stages import Part


def with_interpolated_experts(
    source: MegatronReader, read: Callable[[str], Tensor], share: float
) -> Callable[[str], Tensor]:
    """Let `read` return new experts `share` of the way from the original expert (0) to their own weights (1).

    Raises:
        UserError: The model has no new experts.
    """
    if source.spec.moe is None:
        raise UserError(f"--interpolate-experts is about new experts, but {source.folder} is dense; remove it")
    names = {piece.key: piece.hf_names for piece in source.pieces if piece.part is Part.ORIGINAL_EXPERTS}
    original_of = {
        new: original
        for piece in source.pieces
        if piece.part is Part.NEW_EXPERTS
        for new, original in zip(
            piece.hf_names, names[piece.key.replace(".experts.experts.", ".original_experts.0.")], strict=True
        )
    }

    def interpolated(name: str) -> Tensor:
        tensor = read(name)
        if name not in original_of:
            return tensor
        return torch.lerp(read(original_of[name]).float(), tensor.float(), share)

    return interpolated
