"""Megatron's `torch_dist` checkpoints (PyTorch's DCP format), one chunk at a time and without a process group.

PyTorch's writer keeps every tensor of a file in memory until the file is closed, and its reader unpickles `.metadata`
without restriction. The file format is small: a `.distcp` file is a sequence of `torch.save` archives, and `.metadata`
records where each chunk of each tensor is stored. So chunks are written and read here, with PyTorch's metadata classes
and `torch.save`/`torch.load(weights_only=True)`; PyTorch's and Megatron's loaders read the result.
"""

import json
import math
import pickle
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from moelpr.base import checksums, records
from moelpr.base.checksums import FileSum, SummedFile, Verifier, Verify, WrittenFile
from moelpr.base.command import deferred_signals
from moelpr.base.errors import UserError, first_line
from moelpr.base.journal import Journal
from moelpr.base.records import FOREIGN, STRICT
from moelpr.base.run_folder import MEGATRON_CONFIG_FILE, METADATA_FILE, TABLE_FILES

FIX = "copy the checkpoint again, or use another step (--iteration; trainer: --ckpt-step)"
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, config=FOREIGN)
class _MegatronConfig:
    """Megatron's metadata.json, which names the format of a step."""

    sharded_backend: Literal["torch_dist"]


@contextmanager
def damage_named(path: Path | str) -> Iterator[None]:
    """Turn what torch.load raises for a damaged or hostile file into a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path} is missing; {FIX}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if code := re.search(r"(?:GLOBAL|class) '?([\w.]+)", str(error)):
            raise UserError(
                f"{path} is damaged or not a checkpoint: loading it would run {code[1]}, so it is not loaded; {FIX}"
            ) from error
        raise UserError(f"{path} is truncated or damaged ({first_line(error)}); {FIX}") from error


def _check_complete(folder: Path) -> None:
    """UserError if `folder` is not a torch_dist checkpoint, or is incomplete."""
    for name in TABLE_FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a complete torch_dist checkpoint: {name} is missing; {FIX}")


def read_metadata(folder: Path) -> Metadata:
    """Read the table of contents of a step folder, without running code that the pickle `.metadata` could contain.

    The trainer uses this function too, in place of PyTorch's (moelpr/model/megatron/checkpoint_reading.py).

    Raises:
        UserError: `folder` is not a torch_dist checkpoint, is incomplete, or its table of contents is damaged.
    """
    _check_complete(folder)
    path = folder / METADATA_FILE
    try:
        before = _MetadataUnpickler.state()
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if before != _MetadataUnpickler.state():
            raise ValueError("it changes a class")
        contents, places = dict(metadata.state_dict_metadata), dict(metadata.storage_data)
        for place in places.values():
            if Path(place.relative_path).name != place.relative_path or place.relative_path == "..":
                raise ValueError(f"it points outside its folder, to {place.relative_path}")
            range(place.offset, place.offset + place.length)  # both are there, and integers
        for key, entry in contents.items():
            if isinstance(entry, TensorStorageMetadata):
                _check_entry(key, entry)
    except Exception as error:  # a damaged pickle may raise any exception
        raise UserError(f"{path} is damaged ({error}); {FIX}") from error
    records.read(_MegatronConfig, folder / MEGATRON_CONFIG_FILE, FIX)
    return Metadata(contents, storage_data=places)


def _check_entry(key: Any, entry: TensorStorageMetadata) -> None:
    """Raise an exception if what a reader uses of a tensor's entry has another type."""
    sizes = [entry.size, *(numbers for chunk in entry.chunks for numbers in (chunk.offsets, chunk.sizes))]
    if not isinstance(key, str) or not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError(f"the entry {key!r} is not that of a tensor")
    if any(len(numbers) != len(entry.size) or min(numbers, default=0) < 0 for numbers in sizes):
        raise ValueError(f"the chunks of {key} do not have {len(entry.size)} dimensions")


def _slices(lower: list[int], upper: list[int], offsets: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - offset, b - offset) for a, b, offset in zip(lower, upper, offsets, strict=True))


class _Ignored:
    """Placeholder for any other object in `.metadata`; accepts what an unpickler does and does nothing."""

    def __init__(self, *_: Any):
        pass

    def _do_nothing(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = _do_nothing


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the table of contents only: a checkpoint from an untrusted source must not run code."""

    _ALLOWED = {
        "torch": "Size",
        "torch.serialization": "_get_layout",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
        "ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
    }

    @classmethod
    def state(cls) -> list[Any]:
        """All that a pickle could set on the classes and functions that it may name."""
        modules = {module: names.split() for module, names in cls._ALLOWED.items()}
        named = [getattr(import_module(module), name) for module in modules for name in modules[module]]
        return [(dict(vars(one)), getattr(one, "__defaults__", None)) for one in named]

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        return _Ignored


@dataclass(frozen=True, config=STRICT)
class _Chunk:
    """A chunk of a tensor in a `.distcp` file."""

    key: str
    dtype: str
    shape: list[int]
    global_shape: list[int]
    offsets: list[int]
    start: int
    length: int


@dataclass(frozen=True, config=STRICT)
class _DistcpFile(WrittenFile):
    """A complete `.distcp` file in a journal."""

    chunks: list[_Chunk]


class TorchDistWriter:
    """Writes a step folder chunk by chunk and keeps only the table of contents in memory.

    The folder can be loaded after `finish`. Chunks of files that an interrupted writer completed count as written
    (`is_written`); write the others again, in the same order.

    Args:
        journal: Where complete files are recorded and those of an interrupted writer are found; None for none.
        max_file_bytes: Size after which a new `.distcp` file begins.
    """

    def __init__(self, folder: Path, journal: Journal | None = None, max_file_bytes: int = MAX_FILE_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._journal = journal
        self._max_file_bytes = max_file_bytes
        self._contents: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: SummedFile | None = None
        self._sums: dict[str, FileSum] = {}  # the sums of complete files
        self._open_chunks: list[_Chunk] = []  # the chunks of the open file, for the journal
        self._written: set[tuple[str, tuple[int, ...]]] = set()
        for file in journal.entries(_DistcpFile) if journal is not None else []:
            self._sums[file.name] = file.sum
            for chunk in file.chunks:
                self._register(chunk, _StorageInfo(file.name, chunk.start, chunk.length))
                self._written.add((chunk.key, tuple(chunk.offsets)))

    def __enter__(self) -> "TorchDistWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def is_written(self, key: str, offsets: Sequence[int]) -> bool:
        """Whether an interrupted writer already wrote the chunk of `key` at `offsets`."""
        return (key, tuple(offsets)) in self._written

    def write(
        self, key: str, tensor: Tensor, global_shape: Sequence[int] | None = None, offsets: Sequence[int] = ()
    ) -> None:
        """Write `tensor`, or with `global_shape` the part of a tensor of this shape that starts at `offsets`."""
        if global_shape is None:
            global_shape, offsets = tensor.shape, (0,) * tensor.dim()
        # torch.save writes the complete storage of a view.
        owns_storage = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        place = self._append(tensor.detach() if owns_storage else tensor.detach().contiguous().clone())
        dtype = str(tensor.dtype).removeprefix("torch.")
        shapes = list(tensor.shape), list(global_shape), list(offsets)
        chunk = _Chunk(key, dtype, *shapes, place.offset, place.length)
        self._open_chunks.append(chunk)
        self._register(chunk, place)

    def write_object(self, key: str, value: Any) -> None:
        """Write an object other than a tensor as Megatron writes an unsharded ShardedObject."""
        key = f"{key}/shard_0_1"
        self._contents[key] = BytesStorageMetadata()
        self._places[MetadataIndex(key)] = self._append([value])

    def finish(self, common_state: dict[str, Any]) -> None:
        """Write Megatron's non-tensor state, the table of contents and the checksums."""
        self.write_object("common_state", common_state)
        assert self._file is not None
        self._sums[self._file.name] = self._file.finish()  # its objects are not in the journal
        metadata = Metadata(self._contents, storage_data=self._places, version=CURRENT_DCP_VERSION)
        (self._folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._folder / MEGATRON_CONFIG_FILE).write_text(json.dumps(config))
        checksums.write(self._folder, self._sums | {name: FileSum.of(self._folder / name) for name in TABLE_FILES})

    def _register(self, chunk: _Chunk, place: _StorageInfo) -> None:
        key = sys.intern(chunk.key)  # one object, also of a resumed writer: pickle writes an object once
        dtype, offsets = getattr(torch, chunk.dtype), torch.Size(chunk.offsets)
        size = torch.Size(chunk.global_shape)
        entry = self._contents.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), size, []))
        assert isinstance(entry, TensorStorageMetadata) and entry.size == size and entry.properties.dtype == dtype, key
        self._places[MetadataIndex(key, offsets, len(entry.chunks))] = place
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.shape)))

    def _append(self, value: Any) -> _StorageInfo:
        if self._file is not None and self._file.tell() >= self._max_file_bytes:
            file = _DistcpFile(self._file.name, self._file.finish(), self._open_chunks)
            self._sums[file.name] = file.sum
            if self._journal is not None:
                self._journal.add(file)
            self._file, self._open_chunks = None, []
        if self._file is None:
            self._file = SummedFile(self._folder / f"__0_{len(self._sums)}.distcp")
        start = self._file.tell()
        try:
            with deferred_signals():  # torch.save would raise its own error in place of theirs
                torch.save(value, cast(BinaryIO, self._file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk
                raise error.__context__ from None
            raise
        return _StorageInfo(self._file.name, start, self._file.tell() - start)


class TorchDistReader:
    """Reads a step folder tensor by tensor, keeping in memory only the chunks of the last read.

    Adjacent slices of a stack are mostly in the same chunks, so reading them in order reads each chunk once.
    """

    def __init__(self, folder: Path, verify: Verify = Verify.FULL):
        self._folder = folder
        _check_complete(folder)
        self._verifier = Verifier(folder, FIX, verify, is_expected=True)
        for name in TABLE_FILES:
            self._verifier.verify(name)
        metadata = read_metadata(folder)
        entries = metadata.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._loaded: dict[tuple[str, torch.Size], Tensor] = {}

    @property
    def keys(self) -> set[str]:
        """Names of the tensors in the checkpoint."""
        return set(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def read(self, key: str, index: int | None = None) -> Tensor:
        """Read the complete tensor, or only the chunks of `tensor[index]`."""
        entry = self._entry(key)
        start, size = [0] * len(entry.size), list(entry.size)
        if index is not None:
            start[0], size[0] = index, 1
        needed = {}
        for chunk in entry.chunks:
            # The overlap of the chunk and the requested slice, in the coordinates of the tensor.
            lower = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            upper = [min(a + n, b + m) for a, n, b, m in zip(start, size, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(lower, upper, strict=True)):
                needed[key, chunk.offsets] = (chunk, lower, upper)
        self._loaded = {place: tensor for place, tensor in self._loaded.items() if place in needed}

        result: Tensor | None = None
        filled = 0
        for place, (chunk, lower, upper) in needed.items():
            if place not in self._loaded:
                self._loaded[place] = self._load_chunk(key, chunk)
            part = self._loaded[place][_slices(lower, upper, chunk.offsets)]
            filled += part.numel()
            if list(part.shape) == size:
                result = part  # a view, without a copy
                break
            if result is None:
                result = torch.empty(size, dtype=part.dtype)
            result[_slices(lower, upper, start)] = part
        if result is None or filled != math.prod(size):
            raise UserError(f"{self._folder} is incomplete: parts of {key} are missing; save the checkpoint again")
        return result if index is None else result[0]

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._entries:
            raise UserError(f"{self._folder} lacks the tensor {key}; convert the model again")
        return self._entries[key]

    def _load_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        if (info := self._places.get(MetadataIndex(key, chunk.offsets))) is None:
            raise UserError(f"{self._folder} is incomplete: parts of {key} are missing; save the checkpoint again")
        path = self._folder / info.relative_path
        with damage_named(path):
            self._verifier.verify(info.relative_path)
            with open(path, "rb") as file:
                view = cast(BinaryIO, _create_file_view(file, info.offset, info.length))
                # map_location: chunks saved on a GPU must load on a machine without one.
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise UserError(f"{path} is damaged: the chunk of {key} does not have shape {tuple(chunk.sizes)}")
        return tensor.detach()
