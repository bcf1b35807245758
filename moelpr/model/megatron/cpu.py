"""Patches that let Megatron Core 0.19.2 train on CPU with gloo.

Megatron assumes CUDA in a few dozen places. Without a GPU, `install()` replaces them with their CPU counterparts; with
one it does nothing. Each patch states its reason; `tests/unit/model/megatron/test_cpu.py` fails when a patched name
is gone or a patch is no longer needed.
"""

import collections
import contextlib
import functools
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from moelpr.base import machine
from moelpr.model.megatron.replacing import replaces

CPU = torch.device("cpu")

# Megatron arguments that choose CUDA-only kernels or CUDA behavior, with the value that works on CPU.
CPU_ARGUMENTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "num_workers": 0,
}

# torch functions that Megatron calls with device="cuda" or a CUDA device index.
_FACTORIES = "tensor as_tensor zeros ones empty full rand randn arange zeros_like ones_like empty_like".split()

_installed = False


def is_needed() -> bool:
    """True on a machine without a usable GPU."""
    return _installed or not torch.cuda.is_available()


def unusable_gpus() -> str | None:
    """A message with the remedy if there are GPUs, not hidden from this process, that PyTorch cannot use."""
    if not is_needed() or not machine.has_gpus():
        return None
    if torch.version.cuda is None:
        problem = f"PyTorch {torch.__version__} is built without CUDA; install one with it"
    else:
        problem = (
            f"PyTorch {torch.__version__} cannot use them: this process may not, or NVIDIA's driver is too old for "
            f"CUDA {torch.version.cuda} (nvidia-smi shows the newest that it supports); update the driver"
        )
    return f"this machine has GPUs, but {problem}, or hide the GPUs to use the CPU (CUDA_VISIBLE_DEVICES=)"


def install() -> None:
    """Patch torch.cuda and Megatron for CPU, once and only without a GPU. Call it before Megatron is imported."""
    global _installed
    if _installed or not is_needed():
        return
    _installed = True
    # This logger warns at every import that there is no CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.compile = _leave_eager
    if "torch._dynamo" in sys.modules:  # something may be compiled already
        torch.compiler.set_stance("force_eager")
    patch_torch_cuda()
    _patch_torch_tensors()
    _patch_gloo()
    _patch_megatron()


def _leave_eager(function: Any = None, **_: Any) -> Any:
    """Do without torch's compiler, which takes 2 s to import and would run a C++ compiler for minutes."""
    return function or _leave_eager


def async_save_worker(*args: Any, **kwargs: Any) -> None:
    """Run Megatron's loop in the helper process of `--async-save`, which would look for its CUDA device."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = doing_nothing()
    PersistentAsyncCaller.async_loop(*args, **kwargs)


def patch_torch_cuda() -> None:
    """Replace what asks for a CUDA device."""
    cuda = torch.cuda
    # One "device" per process, so that parallel_state and the random number trackers are set up.
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: CPU
    for name in ("set_device", "synchronize", "empty_cache", "set_stream", "ipc_collect"):
        setattr(cuda, name, doing_nothing())
    cuda.Stream = cuda.Event = InertStream
    cuda.current_stream = cuda.default_stream = lambda device=None: InertStream()
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = doing_nothing()
    # Random numbers come from the CPU generator. Otherwise dropout and initialization silently use a wrong state.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = doing_nothing()  # torch.manual_seed calls it after seeding the CPU generator
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.Tensor.record_stream = doing_nothing()  # type: ignore[method-assign, assignment]
    # The training log reports these numbers.
    cuda.memory_stats = lambda device=None: collections.defaultdict(int)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    # It is newer than any GPU's, so that no architecture-specific restriction or environment setting applies.
    cuda.get_device_capability = lambda device=None: (99, 0)
    properties = types.SimpleNamespace(major=99, minor=0, name="cpu", total_memory=0)
    cuda.get_device_properties = lambda device=None: properties


def _patch_torch_tensors() -> None:
    # `with torch.device("meta")` compares factories by identity; it looks them up at first use, so before wrapping.
    _device_constructors()
    for name in _FACTORIES:
        replaces(torch, name)(_create_on_cpu)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]

    # The distributed optimizer groups parameters by .type() and supports only torch.cuda.*Tensor.
    @replaces(torch.Tensor, "type")
    def cuda_type(tensor_type: Callable[..., Any], self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return tensor_type(self, dtype, *args, **kwargs)


def _patch_gloo() -> None:
    """Expert tensor parallelism exchanges parts of different sizes, which gloo supports only in all-to-all."""
    import torch.distributed as dist

    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def uneven_all_gather(outputs: list[Tensor], tensor: Tensor, group: Any = None, **kwargs: Any) -> Any:
        if len({output.shape for output in outputs}) == 1:
            return all_gather(outputs, tensor, group=group, **kwargs)
        received = _exchange([tensor] * len(outputs), [len(output) for output in outputs], group)
        for output, part in zip(outputs, received, strict=True):
            output.copy_(part)

    def uneven_reduce_scatter(output: Tensor, parts: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return reduce_scatter(output, parts, *args, **kwargs)
        output.copy_(torch.stack(_exchange(parts, [len(output)] * len(parts), kwargs.get("group"))).sum(dim=0))

    dist.all_gather, dist.reduce_scatter = uneven_all_gather, uneven_reduce_scatter


def _exchange(parts: list[Tensor], rows_received: list[int], group: Any) -> list[Tensor]:
    """Send parts[rank] to each rank of the group; rows_received[rank] rows come back from each."""
    sent = torch.cat(parts)
    received = sent.new_empty(sum(rows_received), *sent.shape[1:])
    rows_sent = [len(part) for part in parts]
    torch.distributed.all_to_all_single(received, sent, rows_received, rows_sent, group=group)
    return list(received.split(rows_received))


def _patch_megatron() -> None:
    import megatron.core.dist_checkpointing.strategies.async_utils as async_utils
    import megatron.core.fusions.fused_bias_swiglu as fused_bias_swiglu
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.mlp as mlp
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.training.initialize as initialize
    import megatron.training.training as training
    import megatron.training.utils.common_utils as common_utils

    from moelpr.model.megatron.swiglu import swiglu, weighted_swiglu

    # By default it asserts torch.cuda.is_available().
    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    # It warms up fused kernels on a CUDA device.
    training.set_jit_fusion_options = doing_nothing()
    # It writes the CUDA generator's state directly.
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # It returns CPU tensors unchanged even when asked for numpy, and the caller then calls numpy methods.
    to_cpu = moe_utils.maybe_move_tensor_to_cpu

    def to_cpu_or_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.numpy()
        return to_cpu(tensor, as_numpy=False, record_stream=False)

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_cpu_or_numpy
    # Megatron's functions make many passes over memory unless compiled.
    fused_bias_swiglu.weighted_bias_swiglu_impl = mlp.weighted_bias_swiglu_impl = weighted_swiglu
    fused_bias_swiglu.bias_swiglu_impl = mlp.bias_swiglu_impl = swiglu
    # The loop runs in a helper process, which is not patched and finds the function by its name.
    async_utils.PersistentAsyncCaller.async_loop = staticmethod(async_save_worker)
    # It reads the memory counters of a CUDA device.
    common_utils.report_memory = training.report_memory = doing_nothing()


def _create_on_cpu(factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        kwargs["device"] = CPU
    return factory(*args, **kwargs)


def doing_nothing() -> Callable[..., None]:
    """Make a new function each time: torch's compiler, which other libraries may import, has one rule per function."""
    return lambda *args, **kwargs: None


class InertStream:
    """Replaces torch.cuda.Stream and torch.cuda.Event: work on the CPU is always in order."""

    priority_range = staticmethod(lambda: (0, 0))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: True if name == "query" else self  # record_event() returns an event

    def __enter__(self) -> "InertStream":
        return self

    def __exit__(self, *exc: object) -> None:
        return None
