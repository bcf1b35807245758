"""Check that no number is lost: dtypes that are too narrow, NaN and Inf."""

import torch
from torch import Tensor

from moelpr.base.errors import UserError

# The elements that are processed at a time, to bound the memory of wider copies.
CHUNK_ELEMENTS = 16 << 20


def cast(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The tensor in `dtype`; UserError if float16, whose largest number is 65,504, is too narrow for it."""
    result = tensor.to(dtype)
    if dtype is torch.float16 and tensor.dtype is not dtype:
        check_finite(result, f"{where} in float16", "its numbers are too large for it; pass another --dtype")
    return result


def check_finite(tensor: Tensor, where: str, fix: str) -> Tensor:
    """Return the tensor; UserError, with what to do (`fix`), if it contains NaN or Inf."""
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise UserError(f"{where} contains NaN or Inf; {fix}")
    return tensor
