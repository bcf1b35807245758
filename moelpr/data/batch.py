"""The tensors of one micro-batch on this rank, and the token counts of its global batch."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "is_original", "is_original_label")
type Samples = Iterator[dict[str, Tensor]]


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
    """Reads all micro-batches of a step before its schedule starts, because the LPR loss needs the step's token count.

    Tensor-parallel rank 0 of every pipeline stage has a data iterator (every stage has routers) and broadcasts to the
    others. The host waits for no GPU.
    """

    def __init__(self) -> None:
        self._waiting: WeakKeyDictionary[Any, deque[Batch]] = WeakKeyDictionary()

    def read(self, owner: Any, data_iterator: Samples | None, num_microbatches: int, shape: tuple[int, int]) -> None:
        """Read micro-batches of `shape` (sequences, tokens) for `owner`, the model chunk that runs them."""
        raw_MKBS = _broadcast(data_iterator, num_microbatches, shape)
        counts = torch.stack([raw_MKBS[:, _KEYS.index(key)].sum() for key in ("is_original", "loss_mask")]).float()
        torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        global_counts = GlobalCounts(*counts.unbind())
        samples = (dict(zip(_KEYS, raw_KBS, strict=True)) for raw_KBS in raw_MKBS)
        self._waiting[owner] = deque(_to_batch(slice_for_context_parallel(sample), global_counts) for sample in samples)

    def next(self, owner: Any) -> Batch:
        """Return the next micro-batch of `owner`."""
        return self._waiting[owner].popleft()


def _broadcast(data_iterator: Samples | None, num_microbatches: int, shape: tuple[int, int]) -> Tensor:
    """Return the micro-batches as one int64 tensor on every tensor-parallel rank."""
    sizes, device = (num_microbatches, len(_KEYS), *shape), torch.cuda.current_device()
    if data_iterator is None:
        raw = torch.empty(sizes, dtype=torch.int64, device=device)
    else:
        on_host = torch.empty(sizes, dtype=torch.int64, pin_memory=torch.cuda.is_available())
        for of_one in on_host:
            sample = next(data_iterator)
            for key, into in zip(_KEYS, of_one, strict=True):
                into.copy_(sample[key])
        raw = on_host.to(device, non_blocking=True)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.broadcast(raw, parallel_state.get_tensor_model_parallel_src_rank(), group)
    return raw


def _to_batch(tensors: dict[str, Tensor], counts: GlobalCounts) -> Batch:
    dtypes = {"loss_mask": torch.float32, "is_original": torch.bool, "is_original_label": torch.bool}
    return Batch(**{key: tensors[key].to(dtypes.get(key, torch.int64)) for key in _KEYS}, counts=counts)


def slice_for_context_parallel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this context-parallel rank's part of the sequence (Megatron's balanced two-chunk split)."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return tensors
    return get_batch_on_this_cp_rank(tensors, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
