"""The tensors of one micro-batch on this rank, and the token counts of its global batch."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "is_original", "is_original_label")


@dataclass(frozen=True)
class GlobalCounts:
    """Token counts of a step, over all micro-batches and data-parallel ranks; fp32 scalars."""

    original_tokens: Tensor
    loss_tokens: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch on this rank; every tensor is [batch, sequence / context-parallel size]."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor  # fp32, 1 where the label counts
    position_ids: Tensor
    is_original: Tensor  # bool, of `tokens`
    is_original_label: Tensor  # bool, of `labels`
    counts: GlobalCounts


class BatchReader:
    """Reads micro-batches, all of a step at once, because the LPR loss needs the step's token count.

    Tensor-parallel rank 0 of every pipeline stage has a data iterator (every stage has routers) and broadcasts to the
    others.
    """

    def __init__(self) -> None:
        self._waiting: WeakKeyDictionary[Any, deque[Batch]] = WeakKeyDictionary()

    def next(self, data_iterator: Iterator[dict[str, Tensor]] | None, num_microbatches: int, owner: Any) -> Batch:
        """Return the next micro-batch of `owner`, the model chunk that runs it (each chunk reads its own data)."""
        waiting = self._waiting.setdefault(owner, deque())
        if not waiting:
            waiting.extend(self._read_step(data_iterator, num_microbatches))
        return waiting.popleft()

    def _read_step(self, data_iterator: Iterator[dict[str, Tensor]] | None, num_microbatches: int) -> list[Batch]:
        raw = [_broadcast(next(data_iterator) if data_iterator is not None else None) for _ in range(num_microbatches)]
        counts = torch.stack(
            [torch.stack([tensors["is_original"].sum(), tensors["loss_mask"].sum()]).float() for tensors in raw]
        ).sum(dim=0)
        torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        global_counts = GlobalCounts(*counts.unbind())
        return [_to_batch(slice_for_context_parallel(tensors), global_counts) for tensors in raw]


def _broadcast(sample: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the same int64 tensors on every tensor-parallel rank."""
    if sample is not None:
        sample = {key: sample[key].long() for key in _KEYS}
    return tensor_parallel.broadcast_data(list(_KEYS), sample, torch.int64)


def _to_batch(tensors: dict[str, Tensor], counts: GlobalCounts) -> Batch:
    dtypes = {"loss_mask": torch.float32, "is_original": torch.bool, "is_original_label": torch.bool}
    return Batch(**{key: tensors[key].to(dtypes.get(key, torch.int64)) for key in _KEYS}, counts=counts)


def slice_for_context_parallel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this context-parallel rank's part of the sequence (Megatron's balanced two-chunk split)."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return tensors
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(tensors, is_hybrid_cp=False, cp_group=group)
