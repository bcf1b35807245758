"""Counts what a rank launches: kernels with their operations and bytes, waits of the host, collectives, live memory."""

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# They launch nothing, though their schema does not say so.
_INERT = set(
    "aten::_unsafe_view aten::detach aten::lift_fresh aten::empty aten::empty_like aten::new_empty "
    "aten::empty_strided aten::new_empty_strided aten::is_same_size aten::resize_ aten::set_ aten::t "
    "aten::_reshape_alias aten::record_stream".split()
)
_ALLOCATION = 512  # the caching allocator's unit, in bytes


class Group(NamedTuple):
    """A process group: what Megatron calls it, and its ranks."""

    name: str
    members: tuple[int, ...]


class Kernel(NamedTuple):
    """A launch: in which part of the step, of which operator, the bytes that it touches and its FLOPs."""

    phase: str
    operator: str
    num_bytes: int
    flops: int


class Collective(NamedTuple):
    """A collective; `num_bytes` are those of the whole tensor, gathered or not yet scattered."""

    phase: str
    operator: str
    group: Group
    num_bytes: int

    @property
    def moved(self) -> float:
        """Bytes that a rank sends: of all but its own part, in a sum of all tensors twice."""
        size = len(self.group.members)
        if self.operator in ("send", "recv_", "broadcast_"):
            return 0.0 if self.operator == "recv_" else self.num_bytes
        return self.num_bytes * (size - 1) / size * (2 if self.operator.startswith("allreduce") else 1)


@dataclass
class Counts:
    """The launches and waits of a step."""

    kernels: Counter[Kernel] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)

    def extrapolated(self, larger: "Counts", times: float) -> "Counts":
        """These counts, and `times` the difference between them and those of a step with more micro-batches."""

        def one[T](ours: Counter[T], theirs: Counter[T]) -> Counter[T]:
            every = ours.keys() | theirs.keys()
            return Counter({key: round(ours[key] + times * (theirs[key] - ours[key])) for key in every})

        collectives = one(self.collectives, larger.collectives)
        return Counts(one(self.kernels, larger.kernels), one(self.waits, larger.waits), collectives)


class Meter(TorchDispatchMode):
    """Counts while it is entered; `number` is the answer to every question for a number that only a GPU knows."""

    active: "Meter | None" = None
    groups: dict[str, Group] = {}

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.phase = "start"
        self.live = self.peak = 0
        self.counts = Counts()
        self.order: list[Collective] = []  # all that were launched
        self.in_flight: dict[int, torch.Tensor] = {}  # copies to the host, by storage, that it has not waited for
        self._storages: dict[int, Any] = {}
        self._fused = 0

    def start_step(self) -> Counts:
        """Count from here on in the returned counts."""
        self.phase, self.peak, self.counts = "other", self.live, Counts()
        return self.counts

    def __enter__(self) -> "Meter":
        Meter.active = self
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        Meter.active = None
        super().__exit__(*exc)

    @staticmethod
    def note_wait(operation: str) -> None:
        if Meter.active is not None:
            Meter.active.counts.waits[f"{operation} in {_caller()}"] += 1

    def as_phase[**P, T](self, phase: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, whose launches belong to a phase."""

        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return wrapped

    def as_one_kernel[**P, T](self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function that a GPU run compiles: one kernel, which touches its arguments and results only."""

        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            self._fused += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self._fused -= 1
            if not self._fused:
                self._track(result)
                touched = sum(map(touched_bytes, tensors_of((args, kwargs, result))))
                self.counts.kernels[Kernel(self.phase, f"compiled {name}", touched, 0)] += 1
            return result

        return wrapped

    def note_kernel(self, name: str, tensors: list[torch.Tensor], flops: int) -> None:
        """Count a kernel that touches these tensors."""
        self.counts.kernels[Kernel(self.phase, name, sum(map(touched_bytes, tensors)), flops)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        from moelpr.model.layers.experts import grouped_mm_is_one_kernel  # with Megatron, on fake GPUs

        name = func._schema.name
        if name == "aten::nonzero":
            self.note_wait("nonzero")
            return torch.empty(self.number, args[0].dim(), dtype=torch.long, device=args[0].device)
        if name == "aten::_local_scalar_dense":
            return self._value(func, args[0])
        if name == "aten::_grouped_mm" and not grouped_mm_is_one_kernel(args[0].dtype):
            self.note_wait("grouped_mm")  # and it launches a product per expert, which is not counted
        if name == "aten::equal":
            self.note_wait("equal")
            return True
        if name.startswith("c10d::"):
            self._note_collective(name, args)
            if "coalesced" in name:  # torch has no fake implementation
                return torch._C._distributed_c10d.FakeWork().boxed()
        result = func(*args, **kwargs)
        self._track(result)
        if not name.startswith(("c10d::", "prim::", "profiler::")) and not self._fused:
            self._note_kernel(func, args, kwargs, result)
        return result

    def _value(self, func: Any, tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                return func(tensor)
        if tensor.device.type == "cuda":
            self.note_wait("item")
        elif tensor.untyped_storage()._cdata in self.in_flight:
            raise RuntimeError(f"{_caller()} reads a number whose copy to the host it has not waited for")
        if tensor.constant is not None:  # made from a number on the host
            return tensor.constant.item()
        if tensor.dtype == torch.bool:
            return False
        return 0.0 if tensor.dtype.is_floating_point else self.number

    def _track(self, result: Any) -> None:
        if self._fused:
            return
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if tensor.device.type != "cuda" or (key := storage._cdata) in self._storages:
                continue
            size = -(-storage.nbytes() // _ALLOCATION) * _ALLOCATION
            self.live += size
            self.peak = max(self.peak, self.live)

            def free(_: Any, key: int = key, size: int = size) -> None:
                if self._storages.pop(key, None) is not None:
                    self.live -= size

            self._storages[key] = weakref.ref(storage, free)

    def _note_collective(self, name: str, args: tuple) -> None:
        boxes = [item for item in args if isinstance(item, torch.ScriptObject) and "ProcessGroup" in str(item._type())]
        sizes = [sum(tensor.nbytes for tensor in tensors_of(item)) for item in args]
        if not boxes or not any(sizes):  # the end of a block of collectives
            return
        group = torch.distributed.ProcessGroup.unbox(boxes[0])
        world = Group("WORLD", tuple(range(group.size())))
        one = Collective(self.phase, name.split("::")[1], self.groups.get(group.group_name, world), max(sizes))
        self.counts.collectives[one] += 1
        self.order.append(one)

    def _note_kernel(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        name, results = func._schema.name, tensors_of(result)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            is_asynchronous = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            way = f"{source.device.type} to {results[0].device.type}"
            if source.device.type != results[0].device.type and not is_asynchronous:
                self.note_wait(f"copy from {way}")
            elif way == "cuda to cpu":
                self.in_flight[results[0].untyped_storage()._cdata] = results[0]
        if func.is_view or name in _INERT or all(tensor.device.type != "cuda" for tensor in results):
            return
        # A tensor that is updated in place is read and written.
        read = {id(one): one for one in tensors_of((args, kwargs)) if one.device.type == "cuda"}
        touched = sum(map(touched_bytes, [*read.values(), *results]))
        operator = name.split("::")[1]
        self.counts.kernels[Kernel(self.phase, operator, touched, _flops(func, args, kwargs, result))] += 1


def touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a kernel touches of a tensor; dimensions that repeat the same elements count once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def tensors_of(items: Any) -> list[torch.Tensor]:
    if isinstance(items, torch.Tensor):
        return [items]
    if isinstance(items, dict):
        items = items.values()
    elif not isinstance(items, list | tuple):
        return []
    return [tensor for item in items for tensor in tensors_of(item)]


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """A product's operations, a multiply and an add counting as two; of causal attention the half that counts."""
    name = func._schema.name.split("::")[1]
    if name == "_grouped_mm":  # each row meets one expert's matrix; in the gradient of weights, each pair of columns
        left, right = args[0], args[1]
        return 2 * math.prod(left.shape) * right.shape[-1]
    if name.startswith("_varlen_attn"):
        names = [argument.name for argument in func._schema.arguments]
        return attention_flops(is_backward="backward" in name, **dict(zip(names, args, strict=False)) | kwargs)
    if (count := flop_registry.get(func._overloadpacket)) is None:
        return 0
    return int(count(*args, **kwargs, out_val=result)) // (2 if "attention" in name else 1)


def attention_flops(
    query: torch.Tensor, max_q: int, is_backward: bool, window_size: list[int] | None = None, **_: Any
) -> int:
    """The products of causal attention within documents or a window, at most: with one document per sequence.

    Args:
        query: [tokens, heads, head_dim].
        max_q: tokens per sequence.
    """
    window = max_q if window_size is None or window_size[0] < 0 else min(window_size[0] + 1, max_q)
    pairs = query.shape[0] * (window - window * (window - 1) / (2 * max_q))
    return int((5 if is_backward else 2) * 2 * pairs * math.prod(query.shape[1:]))


def _caller() -> str:
    """folder/file.py function of the innermost frame of Megatron or moelpr outside this package."""
    frame: Any = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if {"megatron", "moelpr"} & set(path.parts) and path.parent != Path(__file__).parent:
            return f"{'/'.join(path.parts[-2:])} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
