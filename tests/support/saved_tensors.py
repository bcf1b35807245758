"""Bytes that autograd keeps, to compare them with the planner's."""

from collections import Counter

import torch


class SavedTensors:
    """Bytes that autograd keeps for the backward pass: now and at most. Each storage counts once, parameters never.

    Only live storages count, so micro-batches in flight and recomputed layers have their true size.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.parameter_storages: set[int] = set()
        self._holders: Counter[int] = Counter()

    def pack(self, tensor: torch.Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameter_storages:
            return _Held(tensor, None, self)
        if self._holders[storage.data_ptr()] == 0:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._holders[storage.data_ptr()] += 1
        return _Held(tensor, storage, self)

    def release(self, storage: torch.UntypedStorage) -> None:
        self._holders[storage.data_ptr()] -= 1
        if self._holders[storage.data_ptr()] == 0:
            self.live -= storage.nbytes()


class _Held:
    """A saved tensor; its storage stops counting when autograd releases it."""

    def __init__(self, tensor: torch.Tensor, storage: torch.UntypedStorage | None, counter: SavedTensors) -> None:
        self.tensor, self._storage, self._counter = tensor.detach(), storage, counter

    def __del__(self) -> None:
        if self._storage is not None:
            self._counter.release(self._storage)
