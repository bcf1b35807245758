"""The rank of this process among those of a run, and what the ranks tell each other.

A command that no launcher started has rank 0 of 1. Importing this module does not import torch.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

# Variables of `moelpr train`, torchrun, Kubernetes' indexed jobs, SkyPilot and Slurm.
_NODE_RANKS = ("NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK", "SLURM_NODEID")


def rank() -> int:
    """The number of this process, also before torch.distributed is initialized."""
    return int(_distributed().get_rank() if _is_initialized() else os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of ranks, also before torch.distributed is initialized."""
    return int(_distributed().get_world_size() if _is_initialized() else os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of ranks of this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def node_rank() -> int:
    """The number of this node among those that a launcher or a scheduler has started together."""
    return int(next((os.environ[name] for name in _NODE_RANKS if os.environ.get(name)), "0"))


def is_first_rank() -> bool:
    """Whether this process has rank 0, which writes files and prints messages."""
    return rank() == 0


def is_last_rank() -> bool:
    """Whether this process has the highest rank, which has the loss and prints Megatron's log."""
    return rank() == world_size() - 1


def own_share[T](items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, n being the number of ranks; all of them before torch.distributed is initialized."""
    return items[rank() :: world_size()] if _is_initialized() else items


def gather[T](own: T) -> list[T]:
    """The values of all ranks, in order; all must call it. Before torch.distributed is initialized, only `own`."""
    if not _is_initialized():
        return [own]
    of_ranks: list[Any] = [None] * world_size()
    _distributed().all_gather_object(of_ranks, own)
    return of_ranks


def _distributed() -> Any:
    return sys.modules.get("torch.distributed")


def _is_initialized() -> bool:
    return _distributed() is not None and _distributed().is_initialized()
