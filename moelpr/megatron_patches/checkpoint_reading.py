"""Checkpoints are read without running code that they may contain, and a damaged file is an error that names it.

torch 2.15 and Megatron Core 0.19.2 unpickle a checkpoint's table of contents (`.metadata`) and its objects (random
state, arguments, FP8 scales) without restriction. `tests/unit/megatron_patches/test_checkpoint_reading.py` fails when a
patched name is gone or a patch is no longer needed.
"""

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from moelpr.checkpoints.torch_dist import read_metadata
from moelpr.process.errors import UserError, first_line

_FIX = "copy the checkpoint again, or use another step (trainer: --ckpt-step)"


@cache
def install() -> None:
    """Restrict every reader of checkpoints in this process, once."""
    # torch's own switch: every torch.load builds only tensors, containers, and the classes that Megatron registers
    # (megatron/core/safe_globals.py), even where the caller asks for weights_only=False. Helper processes inherit it.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch.load refuses to run with both
    FileSystemReader.read_metadata = _restricted(FileSystemReader.read_metadata)  # type: ignore[method-assign]
    FileSystemReader._slice_file = _remember_file(FileSystemReader._slice_file)  # type: ignore[method-assign]
    FileSystemReader.read_data = _name_damaged_file(FileSystemReader.read_data)  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _check_module_states(DefaultLoadPlanner.load_bytes)  # type: ignore[method-assign]
    checkpoint.load = _one_error(checkpoint.load)
    _name_damaged_common_state()
    _refuse_other_formats()


@contextmanager
def damage_named(path: Path | str) -> Iterator[None]:
    """Turn what torch.load raises for a damaged or hostile file into a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path} is missing; {_FIX}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if found := re.search(r"(?:GLOBAL|class) '?([\w.]+)", str(error)):
            raise UserError(
                f"{path} is damaged or not a checkpoint: loading it would run {found[1]}, so it is not loaded; {_FIX}"
            ) from error
        raise UserError(f"{path} is truncated or damaged ({first_line(error)}); {_FIX}") from error


def _restricted(read: Callable[..., Metadata]) -> Callable[..., Metadata]:
    """torch's method unpickles the file without restriction."""

    @wraps(read)
    def read_restricted(self: Any, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    return read_restricted


def _remember_file(slice_file: Callable[..., Any]) -> Callable[..., Any]:
    """torch's errors do not say which file they are about."""

    @wraps(slice_file)
    def slice_and_remember(self: Any, file: Any, info: Any) -> Any:
        self.file_being_read = file.name
        return slice_file(self, file, info)

    return slice_and_remember


def _name_damaged_file(read_data: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(read_data)
    def read(self: Any, *args: Any) -> Any:
        try:
            return read_data(self, *args)
        except Exception as error:
            with damage_named(getattr(self, "file_being_read", self.path)):
                raise error

    return read


def _check_module_states(load_bytes: Callable[..., None]) -> Callable[..., None]:
    """Transformer Engine unpickles byte tensors in the states of its modules (FP8 scales) without restriction."""

    @wraps(load_bytes)
    def load(self: Any, read_item: Any, value: io.BytesIO) -> None:
        load_bytes(self, read_item, value)
        name = read_item.dest_index.fqn
        if "_extra_state" in name and not self.flatten_state_dict:
            check_module_state(self.state_dict[name])

    return load


def check_module_state(state: Any) -> None:
    """Raise an UnpicklingError if Transformer Engine would run code when it loads this state of one of its modules."""
    from megatron.core.safe_globals import SafeUnpickler

    for part in state if isinstance(state, list) else [state]:
        if isinstance(part, torch.Tensor) and part.numel():
            SafeUnpickler(io.BytesIO(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())).load()


def _one_error(load: Callable[..., Any]) -> Callable[..., Any]:
    """Raise one error: torch collects all ranks' in a CheckpointException, which does not derive from Exception."""

    @wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except CheckpointException as collected:
            for reader in (*args, *kwargs.values()):
                if isinstance(reader, FileSystemReader):
                    reader.read_metadata()  # its error is lost: torch looks for metadata of single ranks then
            error = next(iter(collected.failures.values()))[0]
            if isinstance(error, (UserError, OSError)) or not isinstance(error, Exception):
                raise error from None
            raise RuntimeError(f"cannot load the checkpoint: {first_line(error)}") from error

    return load_checkpoint


def _name_damaged_common_state() -> None:
    """Checkpoints of older Megatron versions have a file `common.pt`."""
    from megatron.core.dist_checkpointing import serialization

    load_common = serialization.load_common

    @wraps(load_common)
    def load(checkpoint_dir: str) -> Any:
        with damage_named(Path(checkpoint_dir, "common.pt")):
            return load_common(checkpoint_dir)

    serialization.load_common = load


def _refuse_other_formats() -> None:
    """Megatron's error, if a step folder looks like one of an older version, has a traceback."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.core import CheckpointingException

    verify = serialization.verify_checkpoint

    @wraps(verify)
    def verify_checkpoint(checkpoint_dir: str) -> Any:
        try:
            return verify(checkpoint_dir)
        except CheckpointingException as error:
            raise UserError(f"{first_line(error)}; {_FIX}") from error

    serialization.verify_checkpoint = verify_checkpoint
