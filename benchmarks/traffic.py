"""Counting the bytes that all-to-alls exchange with other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Traffic:
    """Bytes this rank exchanged with other ranks: one (phase, sent, received) per all-to-all, in order."""

    calls: list[tuple[str, int, int]] = field(default_factory=list)
    phase: str = "forward"

    def sent(self, phase: str | None = None) -> int:
        """Bytes sent in a phase, or in all of them."""
        return sum(sent for of, sent, _ in self.calls if phase in (None, of))

    def busier_directions(self) -> list[int]:
        """The larger of bytes sent and received in each all-to-all."""
        return [max(sent, received) for _, sent, received in self.calls]


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what torch.distributed.all_to_all_single sends inside the context."""
    traffic, all_to_all = Traffic(), torch.distributed.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        names = ("output", "input", "output_split_sizes", "input_split_sizes", "group")
        call = dict(zip(names, args, strict=False)) | kwargs
        group = call.get("group")
        own, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        sent, received = (
            bytes_to_others(call[name], call.get(f"{name}_split_sizes"), own, ranks) for name in ("input", "output")
        )
        traffic.calls.append((traffic.phase, sent, received))
        return all_to_all(*args, **kwargs)

    torch.distributed.all_to_all_single = counting
    try:
        yield traffic
    finally:
        torch.distributed.all_to_all_single = all_to_all


def bytes_to_others(tensor: Tensor, rows_by_rank: list[int] | None, own_rank: int, num_ranks: int) -> int:
    """Bytes of the rows of `tensor` for other ranks; without split sizes all ranks have equal shares."""
    if rows_by_rank is None:
        rows_by_rank = [tensor.shape[0] // num_ranks] * num_ranks
    row_bytes = tensor[0].numel() * tensor.element_size() if len(tensor) else 0
    return row_bytes * int(sum(rows_by_rank) - rows_by_rank[own_rank])
