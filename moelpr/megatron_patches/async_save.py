"""`--async-save` on CPU: the helper process that writes a checkpoint while training continues.

Megatron Core 0.19.2 copies GPU tensors to the helper's memory before training may change them. Without a GPU, two
things fail, silently or with a trainer that waits indefinitely: the helper starts unpatched and divides by the number
of CUDA devices, and it gets CPU tensors as shared memory, which training overwrites while the helper saves it.
"""

from typing import Any

import torch


def install() -> None:
    """Have the helper run `worker`. Called by moelpr.megatron_patches.cpu in the training process."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    # The helper finds it by name, so it imports this module.
    PersistentAsyncCaller.async_loop = staticmethod(worker)


def worker(*args: Any, **kwargs: Any) -> None:
    """Megatron's worker loop, in the helper process."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    share = FileSystemWriterAsync.preload_tensors

    def copy(buckets: list[Any], non_blocking: bool = True) -> list[Any]:
        return [
            (file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (objects, tensors) in share(buckets, non_blocking)
        ]

    FileSystemWriterAsync.preload_tensors = staticmethod(copy)
    PersistentAsyncCaller.async_loop(*args, **kwargs)
