"""Fake CUDA devices and process groups for tensors without values. Patches torch for good: one process per rank.

It depends on torch's internals in four places: its CUDA hooks and device guard (`fake_driver.cpp`), `FakeTensorMode`,
the process group `fake` of torch's tests, and the names of operators. tests/dry_run fails if a new torch changes them.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import types
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moelpr.base.errors import UserError
from moelpr.base.files import atomic_file
from moelpr.model.megatron import cpu
from moelpr.plan.gpus import GIB, Gpu
from moelpr.train.check.meter import Group, Meter

DEVICE = torch.device("cuda:0")
DRIVER = Path(__file__).with_name("fake_driver.cpp")


class FakeStream(cpu.InertStream):
    """Launches are in order on all streams."""

    current: "FakeStream"
    kind = "Stream"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stream_id = self.cuda_stream = 0
        self.device = DEVICE

    def record_event(self, event: Any = None) -> "FakeEvent":
        return FakeEvent()

    def synchronize(self) -> None:
        Meter.note_wait(f"{self.kind}.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class FakeEvent(FakeStream):
    """Covers the copies to the host that were started before it is recorded; Megatron's streams wait for each other."""

    kind = "Event"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.record()

    def record(self, stream: Any = None) -> None:
        self._covered = set(Meter.active.in_flight) if Meter.active else set()

    def synchronize(self) -> None:
        super().synchronize()
        if Meter.active:
            for storage in self._covered:
                Meter.active.in_flight.pop(storage, None)


class OnStream:
    """torch.cuda.stream, which Megatron enters several times."""

    def __init__(self, stream: FakeStream | None) -> None:
        self.stream, self.before = stream, list[FakeStream]()

    def __enter__(self) -> None:
        self.before.append(FakeStream.current)
        FakeStream.current = self.stream or FakeStream.current

    def __exit__(self, *exc: object) -> None:
        FakeStream.current = self.before.pop()


def driver() -> Path:
    """`fake_driver.cpp`, compiled at first use for torch's binary interface; UserError if there is no compiler."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moelpr"
    checksum = hashlib.sha256(DRIVER.read_bytes()).hexdigest()[:8]
    library = cache / f"fake-driver-{checksum}-torch-{torch.__version__}.so"
    if library.exists():
        return library
    if (compiler := shutil.which("g++") or shutil.which("clang++")) is None:
        raise UserError(
            "a dry run needs a C++ compiler once, to run backward passes without a GPU, and finds neither g++ nor "
            "clang++; install one, or use the planner's formulas (moelpr layouts)"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    with atomic_file(library) as made:
        paths = [f"-I{root}/include", "-o", str(made), str(DRIVER), f"-L{root}/lib"]
        command = [compiler, "-O0", "-fPIC", "-shared", "-std=c++20", *paths, "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"a dry run does not work with torch {torch.__version__}, whose interface is another one than that of "
                f"the version in constraints.txt ({done.stderr.strip().splitlines()[0]}); use the planner's formulas "
                "(moelpr layouts)"
            )
    return library


def install(gpu: Gpu, capability: tuple[int, int], per_node: int) -> None:
    """Give torch `per_node` GPUs, whose memory and capability decide which kernels the trainer chooses."""
    ctypes.CDLL(str(driver())).install()
    cpu.patch_torch_cuda()
    torch.compiler.set_stance("force_eager")
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[method-assign, assignment]
    cuda: Any = torch.cuda
    memory = int(gpu.memory_gib * GIB)
    cuda.is_available = lambda: True
    cuda.device_count = lambda: per_node
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: capability
    cuda.get_device_name = lambda device=None: "fake GPU"
    properties = types.SimpleNamespace(
        major=capability[0], minor=capability[1], name="fake GPU", total_memory=memory, multi_processor_count=132
    )
    cuda.get_device_properties = lambda device=None: properties
    for name in ("manual_seed", "_lazy_init", "reset_peak_memory_stats"):
        setattr(cuda, name, cpu.doing_nothing())
    cuda.synchronize = lambda *args, **kwargs: Meter.note_wait("torch.cuda.synchronize")
    FakeStream.current = FakeStream()
    cuda.Stream, cuda.Event = FakeStream, FakeEvent
    cuda.current_stream = cuda.default_stream = lambda device=None: FakeStream.current
    cuda.stream = OnStream
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: None
    torch.nn.functional.scaled_dot_product_attention = _flash_attention


def connect(rank: int, ranks: int) -> None:
    """Be one of `ranks` ranks: collectives do nothing, and what ranks tell each other is what this one says."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed: Any = torch.distributed
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    new_group = distributed.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = "fake"
        kwargs.pop("pg_options", None)
        group = new_group(*args, **kwargs)
        if isinstance(group, distributed.ProcessGroup):
            members = tuple(distributed.get_process_group_ranks(group))
            Meter.groups[group.group_name] = Group(kwargs.get("group_desc") or "", members)
        return group

    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    distributed.new_group = fake_group
    distributed.all_gather_object = all_gather_object
    distributed.broadcast_object_list = lambda *args, **kwargs: None


def _flash_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The kernel that a GPU takes in bf16: without a GPU to ask, torch would choose the one for any shape.

    A mask keeps a GPU from taking it, so this names the one that remains.
    """
    if attn_mask is not None:
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
        bias = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
