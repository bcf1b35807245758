"""Write safetensors shards, their index and checksums, one tensor at a time."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.common.numbers import cast
from checkpoint_convert.hf.model_files import MODEL_STEM
from checkpoint_convert.hf.safetensors_reader import DTYPES
from moelpr.base import checksums
from moelpr.base.checksums import FileSum, SummedFile, WrittenFile
from moelpr.base.journal import Journal
from moelpr.model.families.tables import stacked_part

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements as they are stored in a file."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


@dataclass(frozen=True)
class Tensors:
    """Named tensors, in the order in which they are written; each is read on demand."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def num_bytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize * sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a safetensors file, and the tensors (name, shape) whose bytes it consists of."""

    name: str
    shape: tuple[int, ...]
    parts: list[tuple[str, tuple[int, ...]]]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def _stored_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[_StoredTensor]:
    """Join the parts of joined matrices and stacked experts."""
    stored = []
    for name, group in groupby(shapes.items(), key=lambda tensor: stacked_part(tensor[0])[0]):
        parts = list(group)
        shape = parts[0][1]
        if parts[0][0] != name:
            rows = sum(part_shape[0] for _, part_shape in parts)
            experts = {stacked_part(part)[1][0] for part, _ in parts}
            is_stack = all(isinstance(expert, int) for expert in experts)  # else the parts are rows of a tensor
            shape = (len(experts), rows // len(experts), *shape[1:]) if is_stack else (rows, *shape[1:])
        stored.append(_StoredTensor(name, shape, parts))
    return stored


def write_weights(
    journal: Journal, tensors: Tensors, dtype: torch.dtype, max_shard_bytes: int, bar: "tqdm[None]"
) -> None:
    """Write safetensors shards, index and checksums, one tensor at a time; shards of an interrupted call are kept.

    Args:
        journal: The journal of the folder to write.
        tensors: Of stacked experts, all parts follow one another.
        max_shard_bytes: Largest size of a shard; a larger tensor gets its own.
    """
    shards: list[list[_StoredTensor]] = [[]]
    total_size = filled = 0
    for tensor in _stored_tensors(tensors.shapes):
        nbytes = tensor.num_elements * dtype.itemsize
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
        total_size += nbytes
    weight_map: dict[str, str] = {}
    sums = {file.name: file.sum for file in journal.entries(WrittenFile)}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"{MODEL_STEM}{suffix}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        if name in sums:
            bar.update(sum(tensor.num_elements for tensor in shard) * dtype.itemsize)
        else:
            sums[name] = _write_shard(journal.folder / name, shard, dtype, tensors.read, bar)
            journal.add(WrittenFile(name, sums[name]))
    checksums.write(journal.folder, sums)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (journal.folder / f"{MODEL_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    path: Path, shard: list[_StoredTensor], dtype: torch.dtype, read: Callable[[str], Tensor], bar: "tqdm[None]"
) -> FileSum:
    """Stream one file; returns its checksum.

    The safetensors library needs all tensors of a file at once. But a file is a JSON header followed by the bytes, so
    tensors can be streamed if their names, shapes and dtype are known first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored in shard:
        start, end = end, end + stored.num_elements * dtype.itemsize
        header[stored.name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(stored.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with closing(SummedFile(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in (part for stored in shard for part in stored.parts):
            tensor = cast(read(name), dtype, name)
            assert tensor.shape == shape, (name, tensor.shape, shape)
            bar.update(file.write(raw_bytes(tensor)))
            del tensor  # one in memory
        return file.finish()
