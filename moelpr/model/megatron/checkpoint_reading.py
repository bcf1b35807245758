"""Checkpoints are read without running code that they may contain, and a damaged file is an error that names it.

torch 2.15 and Megatron Core 0.19.2 unpickle a checkpoint's table of contents (`.metadata`) and its objects (random
state, arguments, FP8 scales) without restriction. `tests/unit/model/megatron/test_checkpoint_reading.py` fails when a
patched name is gone or a patch is no longer needed.
"""

import io
import os
import zlib
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from moelpr.base.checksums import Pieces
from moelpr.base.errors import UserError, first_line
from moelpr.model.checkpoints.torch_dist import FIX, damage_named, read_metadata
from moelpr.model.megatron.replacing import replaces

_pieces: dict[Path, set[tuple[int, int, int]]] = defaultdict(set)  # read by this rank, of each file


@cache
def install() -> None:
    """Restrict every reader of checkpoints in this process, once."""
    # torch's own switch: every torch.load builds only tensors, containers, and the classes that Megatron registers
    # (megatron/core/safe_globals.py), even where the caller asks for weights_only=False. Helper processes inherit it.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch.load refuses to run with both
    from megatron.core.dist_checkpointing import serialization

    replaces(FileSystemReader, "read_metadata")(_read_restricted)
    replaces(FileSystemReader, "_slice_file")(_read_chunk)
    replaces(FileSystemReader, "read_data")(_read_and_name_damaged_file)
    replaces(DefaultLoadPlanner, "load_bytes")(_load_and_check_module_state)
    replaces(checkpoint, "load")(_load_with_one_error)
    replaces(serialization, "load_common")(_load_common_state)
    replaces(serialization, "verify_checkpoint")(_refuse_other_formats)


def _read_restricted(_: Callable[..., Metadata], self: Any, *args: Any, **kwargs: Any) -> Metadata:
    """torch's method unpickles the file without restriction."""
    metadata = read_metadata(Path(self.path))
    metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def taken(step_folder: Path) -> Pieces:
    """Return the pieces that this rank has read of the files of this folder, by their names; once."""
    return {path.name: _pieces.pop(path) for path in [*_pieces] if path.parent == step_folder}


def _read_chunk(slice_file: Callable[..., Any], self: Any, file: Any, info: Any) -> Any:
    """Read each byte once, for the checksum too; torch.load reads some again, and its errors do not name the file."""
    self.file_being_read = file.name
    content = slice_file(self, file, info).read()
    _pieces[Path(file.name)].add((info.offset, len(content), zlib.crc32(content)))
    return io.BytesIO(content)


def _read_and_name_damaged_file(read_data: Callable[..., Any], self: Any, *args: Any) -> Any:
    try:
        return read_data(self, *args)
    except Exception as error:
        with damage_named(getattr(self, "file_being_read", self.path)):
            raise error


def _load_and_check_module_state(load_bytes: Callable[..., None], self: Any, read_item: Any, value: io.BytesIO) -> None:
    """Transformer Engine unpickles byte tensors in the states of its modules (FP8 scales) without restriction."""
    from megatron.core.safe_globals import SafeUnpickler

    load_bytes(self, read_item, value)
    name = read_item.dest_index.fqn
    state = self.state_dict[name] if "_extra_state" in name and not self.flatten_state_dict else None
    for part in state if isinstance(state, list) else [state]:
        if isinstance(part, torch.Tensor) and part.numel():
            SafeUnpickler(io.BytesIO(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())).load()


def _load_with_one_error(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Raise one error: torch collects all ranks' in a CheckpointException, which does not derive from Exception."""
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


def _load_common_state(load_common: Callable[[str], Any], checkpoint_dir: str) -> Any:
    """Checkpoints of older Megatron versions have a file `common.pt`."""
    with damage_named(Path(checkpoint_dir, "common.pt")):
        return load_common(checkpoint_dir)


def _refuse_other_formats(verify: Callable[[str], Any], checkpoint_dir: str) -> Any:
    """Megatron's error, if a step folder looks like one of an older version, has a traceback."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        return verify(checkpoint_dir)
    except CheckpointingException as error:
        raise UserError(f"{first_line(error)}; {FIX}") from error
