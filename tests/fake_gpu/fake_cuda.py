"""Fake CUDA tensors, which have a device, dtype and shape but no values, for Megatron's and our real layers.

Patches torch for good, so it is used in a process of its own (tests/fake_gpu/forwards.py). There is no backward pass:
autograd asks the driver for the streams of a CUDA tensor.
"""

import contextlib
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moelpr.megatron_patches.cpu import _InertStream

DEVICE = torch.device("cuda:0")


class HostSyncs(TorchDispatchMode):
    """Lists each place in Megatron or moelpr where the host waits for the GPU.

    `torch.nonzero` and values of tensors do so, copies between the two unless they are non-blocking, and
    `Event.synchronize`. As fake tensors have no values, this mode answers the first two: every number is `number`.
    A copy from the GPU that is read before the host has waited for it is an error.
    """

    active: "HostSyncs | None" = None

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.places: list[str] = []
        self.in_flight: list[torch.Tensor] = []  # non-blocking copies to the host

    def __enter__(self) -> "HostSyncs":
        HostSyncs.active = self
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        HostSyncs.active = None
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::nonzero":
            self.record("nonzero")
            return torch.empty(self.number, args[0].dim(), dtype=torch.long, device=args[0].device)
        if name == "aten::_local_scalar_dense":
            storage = args[0].untyped_storage()._cdata
            assert storage not in {tensor.untyped_storage()._cdata for tensor in self.in_flight}, "read too early"
            if args[0].device.type == "cuda":
                self.record("item")
            known = getattr(args[0], "constant", None)  # made from a Python number on the host
            return self.number if known is None else known.item()
        result = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            way = f"{source.device.type} to {result.device.type}"
            is_asynchronous = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            if source.device.type == result.device.type:
                pass
            elif not is_asynchronous:
                self.record(f"copy from {way}")
            elif way == "cuda to cpu":
                self.in_flight.append(result)
        return result

    def record(self, operation: str) -> None:
        self.places.append(f"{operation} in {_caller()}")


class FakeEvent(_InertStream):
    """Covers the copies issued before it is recorded, on whatever stream: Megatron's streams wait for each other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record()

    def record(self, stream: Any = None) -> None:
        self.covered = list(HostSyncs.active.in_flight) if HostSyncs.active else []

    def synchronize(self) -> None:
        if HostSyncs.active:
            HostSyncs.active.record("Event.synchronize")
            left = {id(tensor) for tensor in HostSyncs.active.in_flight} - {id(tensor) for tensor in self.covered}
            HostSyncs.active.in_flight = [tensor for tensor in HostSyncs.active.in_flight if id(tensor) in left]


class FakeStream(_InertStream):
    def record_event(self, event: Any = None) -> FakeEvent:
        return FakeEvent()


def _caller() -> str:
    """folder/file.py function of the innermost frame of Megatron or moelpr."""
    frames = [frame for frame in traceback.extract_stack() if {"megatron", "moelpr"} & set(Path(frame.filename).parts)]
    return f"{'/'.join(Path(frames[-1].filename).parts[-2:])} {frames[-1].name}" if frames else "?"


def install(devices: int) -> None:
    """Give torch this many GPUs of capability 9.0, and Megatron a group of as many ranks.

    torch.cuda.is_available() remains false: torch would start its driver, and a module cannot be moved to a fake GPU.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.compiler.set_stance("force_eager")
    cuda = torch.cuda
    cuda.device_count = lambda: devices
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    for name in "set_device synchronize empty_cache set_stream manual_seed manual_seed_all _lazy_init".split():
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream, cuda.Event = FakeStream, FakeEvent
    cuda.current_stream = cuda.default_stream = lambda device=None: FakeStream()
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: None
    torch.Tensor.record_stream = lambda *args: None

    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda *args, **kwargs: None
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
