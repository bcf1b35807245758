"""Threads that act as ranks of torch.distributed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch


def as_ranks[T](monkeypatch: pytest.MonkeyPatch, world: int, call: Callable[[], T]) -> list[T]:
    """The results of `call` on every rank, which may call all_gather_object."""
    rank, barrier, shares = threading.local(), threading.Barrier(world), {}

    def all_gather(gathered: list[Any], mine: Any, group: Any = None) -> None:
        shares[rank.number] = mine
        barrier.wait(timeout=20)
        gathered[:] = [shares[number] for number in range(world)]
        barrier.wait(timeout=20)

    def run(number: int) -> T:
        rank.number = number
        return call()

    with monkeypatch.context() as patched, ThreadPoolExecutor(world) as ranks:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda group=None: world)
        patched.setattr(torch.distributed, "get_rank", lambda group=None: rank.number)
        patched.setattr(torch.distributed, "all_gather_object", all_gather)
        return list(ranks.map(run, range(world)))
