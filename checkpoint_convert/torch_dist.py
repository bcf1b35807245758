"""Megatron's `torch_dist` checkpoints (PyTorch's DCP format), one chunk at a time and without a process group.

PyTorch's own writer keeps every tensor of a file in memory until the file is closed, and its reader unpickles
`.metadata` with no restriction. The file format itself is small: a `.distcp` file is a row of `torch.save` archives,
`.metadata` says which chunk of which tensor lies where. So chunks are written and read here, with PyTorch's metadata
classes and `torch.save`/`torch.load(weights_only=True)`; what is written loads with PyTorch's and Megatron's loaders.
"""

import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
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

from moelpr.errors import UserError
from moelpr.files import DurableFile

METADATA_FILE = ".metadata"
MEGATRON_CONFIG_FILE = "metadata.json"
MAX_FILE_BYTES = 1 << 30
# What lies in the files that are whole, a line each; gone when the checkpoint is.
JOURNAL_FILE = "written.jsonl"


class TorchDistWriter:
    """Writes a checkpoint folder chunk by chunk; nothing is kept but the table of contents.

    The folder is only loadable after `finish`. A folder that an interrupted writer left is continued: chunks in its
    whole files count as written (`is_written`), the others are to be written again in the same order.
    """

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._contents: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: DurableFile | None = None
        self._num_files = 0
        self._open_chunks: list[dict[str, Any]] = []  # of the open file, for the journal
        self._read_journal()

    def __enter__(self) -> "TorchDistWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def is_written(self, key: str, offsets: Sequence[int]) -> bool:
        """Whether an interrupted writer has written the chunk of `key` at `offsets`."""
        return (key, tuple(offsets)) in self._written

    def write(self, key: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        self.write_chunk(key, tensor, tuple(tensor.shape), (0,) * tensor.dim())

    def write_chunk(self, key: str, tensor: Tensor, global_shape: Sequence[int], offsets: Sequence[int]) -> None:
        """Write `tensor` as the part of `key` (shape `global_shape`) that starts at `offsets`."""
        # A view would drag its whole storage into the file.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        place = self._append(tensor.detach() if whole else tensor.detach().contiguous().clone())
        dtype = str(tensor.dtype).removeprefix("torch.")
        chunk = {"key": key, "shape": list(tensor.shape), "offsets": list(offsets), "dtype": dtype}
        self._open_chunks.append(
            chunk | {"global_shape": list(global_shape), "start": place.offset, "length": place.length}
        )
        self._register(self._open_chunks[-1], place)

    def write_object(self, key: str, value: Any) -> None:
        """Write something that is no tensor, the way Megatron's ShardedObject does (an unsharded one)."""
        key = f"{key}/shard_0_1"
        self._contents[key] = BytesStorageMetadata()
        self._places[MetadataIndex(key)] = self._append([value])

    def finish(self, common_state: dict[str, Any]) -> None:
        """Add Megatron's non-tensor state and the table of contents."""
        self.write_object("common_state", common_state)
        self._close_file()
        (self._folder / JOURNAL_FILE).unlink(missing_ok=True)
        metadata = Metadata(self._contents, storage_data=self._places, version=CURRENT_DCP_VERSION)
        (self._folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._folder / MEGATRON_CONFIG_FILE).write_text(json.dumps(config))

    def _register(self, chunk: dict[str, Any], place: _StorageInfo) -> None:
        key, dtype, offsets = chunk["key"], getattr(torch, chunk["dtype"]), torch.Size(chunk["offsets"])
        size = torch.Size(chunk["global_shape"])
        entry = self._contents.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), size, []))
        assert isinstance(entry, TensorStorageMetadata) and entry.size == size and entry.properties.dtype == dtype, key
        self._places[MetadataIndex(key, offsets, len(entry.chunks))] = place
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["shape"])))

    def _read_journal(self) -> None:
        journal = self._folder / JOURNAL_FILE
        self._written: set[tuple[str, tuple[int, ...]]] = set()
        text = journal.read_text() if journal.is_file() else ""
        lines = text[: text.rfind("\n") + 1]  # a writer may have been killed within a line
        journal.write_text(lines)
        for line in lines.splitlines():
            file = json.loads(line)
            for chunk in file["chunks"]:
                self._register(chunk, _StorageInfo(file["name"], chunk["start"], chunk["length"]))
                self._written.add((chunk["key"], tuple(chunk["offsets"])))
            self._num_files += 1

    def _close_file(self) -> None:
        if self._file is None:
            return
        self._file.finish()
        with open(self._folder / JOURNAL_FILE, "a") as journal:
            journal.write(json.dumps({"name": self._file.name, "chunks": self._open_chunks}) + "\n")
        self._open_chunks = []

    def _append(self, value: Any) -> _StorageInfo:
        if self._file is None or self._file.tell() >= self._max_file_bytes:
            self._close_file()
            self._file = DurableFile(self._folder / f"__0_{self._num_files}.distcp")
            self._num_files += 1
        start = self._file.tell()
        try:
            torch.save(value, cast(BinaryIO, self._file))
        except RuntimeError as error:
            # torch.save hides the write error (a full disk) behind one of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return _StorageInfo(self._file.name, start, self._file.tell() - start)


class TorchDistReader:
    """Reads a checkpoint folder tensor by tensor; keeps the chunks its last read needed and nothing else.

    Neighbouring slices of a stack mostly lie in the same chunks, so reading them in order reads each chunk once.
    """

    def __init__(self, folder: Path):
        """UserError when `folder` is no torch_dist checkpoint."""
        self._folder = folder
        path = folder / METADATA_FILE
        if not path.is_file():
            raise UserError(f"{folder} is no torch_dist checkpoint or an incomplete one: {METADATA_FILE} is missing")
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            self._entries: dict[str, TensorStorageMetadata] = {
                key: entry
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            self._places: dict[MetadataIndex, _StorageInfo] = dict(metadata.storage_data)
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"{path} is damaged ({error}); save the checkpoint again") from error
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
        """The whole tensor, or `tensor[index]` reading only the chunks that hold it."""
        entry = self._entry(key)
        start = [0] * len(entry.size)
        size = list(entry.size)
        if index is not None:
            start[0], size[0] = index, 1
        wanted = {}
        for chunk in entry.chunks:
            # The overlap of the chunk and the wanted box, in the tensor's coordinates.
            lower = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            upper = [min(a + n, b + m) for a, n, b, m in zip(start, size, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(lower, upper, strict=True)):
                wanted[key, chunk.offsets] = (chunk, lower, upper)
        self._loaded = {place: tensor for place, tensor in self._loaded.items() if place in wanted}

        result: Tensor | None = None
        filled = 0
        for place, (chunk, lower, upper) in wanted.items():
            if place not in self._loaded:
                self._loaded[place] = self._load_chunk(key, chunk)
            part = self._loaded[place]
            for axis, (a, b, offset) in enumerate(zip(lower, upper, chunk.offsets, strict=True)):
                part = part.narrow(axis, a - offset, b - a)
            filled += part.numel()
            if list(part.shape) == size:
                result = part
                break
            if result is None:
                result = torch.empty(size, dtype=part.dtype)
            target = result
            for axis, (a, b, offset) in enumerate(zip(lower, upper, start, strict=True)):
                target = target.narrow(axis, a - offset, b - a)
            target.copy_(part)
        if result is None or filled != math.prod(size):
            raise UserError(f"{self._folder} is incomplete: parts of {key} are missing; save the checkpoint again")
        return result if index is None else result[0]

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._entries:
            raise UserError(f"{self._folder} lacks the tensor {key}")
        return self._entries[key]

    def _load_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._places.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise UserError(f"{self._folder} is incomplete: parts of {key} are missing; save the checkpoint again")
        path = self._folder / info.relative_path
        if path.parent != self._folder:
            raise UserError(f"{self._folder / METADATA_FILE} points outside its folder, at {info.relative_path}")
        try:
            with open(path, "rb") as file:
                view = cast(BinaryIO, _create_file_view(file, info.offset, info.length))
                # map_location: chunks saved on a GPU must load on a machine without one.
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"{self._folder} is incomplete: {info.relative_path} is missing") from error
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise UserError(
                f"{path} is truncated or damaged at {key}; save the checkpoint again or copy it anew"
            ) from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise UserError(f"{path} is damaged: the chunk of {key} does not have shape {tuple(chunk.sizes)}")
        return tensor.detach()


class _Ignored:
    """Stands for whatever else a writer left in `.metadata` (its plans, its folder); does nothing."""

    def __init__(self, *_: Any):
        pass

    def _do_nothing(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = _do_nothing


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the table of contents and nothing else: a checkpoint from a stranger must not run code."""

    _ALLOWED = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Ignored
