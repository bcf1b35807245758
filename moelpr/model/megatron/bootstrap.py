"""The start of Megatron: patches, torch.distributed and parallel groups, for the trainer and for single processes."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import HashStore, Store

from moelpr.base import ranks
from moelpr.base.errors import UserError, first_line
from moelpr.base.versions import install_command
from moelpr.model.megatron import cpu, megatron_fixes


def install_patches() -> None:
    """Patch torch and Megatron, once per process. Call this before anything else imports Megatron."""
    _import_transformer_engine()
    cpu.install()  # does nothing if there is a GPU
    megatron_fixes.install()


def _import_transformer_engine() -> None:
    """Megatron imports it too, but expects no error other than that it is not there."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if error.name != "transformer_engine":
            _without_transformer_engine(error)
    except Exception as error:  # it raises errors of several kinds if a library is missing
        _without_transformer_engine(error)


def _without_transformer_engine(error: Exception) -> None:
    if not cpu.is_needed():
        raise UserError(
            f"Transformer Engine is installed but cannot be imported ({first_line(error)}); install it with what it "
            f"needs ({install_command('gpu')}), or remove it ({sys.executable} -m pip uninstall transformer-engine)"
        ) from error
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # for Megatron: it is not there


def rank_store() -> Store | None:
    """The store in which ranks meet; None for that of the launcher, at MASTER_ADDR and MASTER_PORT.

    A single rank meets no other one, so it opens no port, which another program could take first.
    """
    return HashStore() if ranks.world_size() == 1 else None


def connect_ranks() -> None:
    """Initialize torch.distributed for the launcher's ranks, each with a GPU of its own, as Megatron does."""
    has_gpus = not cpu.is_needed()
    if has_gpus:
        torch.cuda.set_device(ranks.local_rank())
    torch.distributed.init_process_group(
        "nccl" if has_gpus else "gloo", store=rank_store(), rank=ranks.rank(), world_size=ranks.world_size()
    )


@contextmanager
def single_process() -> Iterator[None]:
    """Set up torch.distributed and Megatron's groups for a world of one rank, unless they are initialized already."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo" if cpu.is_needed() else "nccl", store=HashStore(), rank=0, world_size=1)
    try:
        with parallel_groups(seed=1234):
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def parallel_groups(seed: int, **sizes: int) -> Iterator[None]:
    """Megatron's parallel groups of these sizes, and its random number generators."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**sizes)
    try:
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
