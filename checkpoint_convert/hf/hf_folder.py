"""Hugging Face model directories: config.json, tokenizer, and safetensors weights, streamed tensor by tensor."""

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from checkpoint_convert.hf.outputs import cast
from moelpr.data.tokenizer import check_text_is_kept, open_hf_tokenizer
from moelpr.data.vocabulary_extension import VOCABULARY_EXTENSION_FILE
from moelpr.families.families import CONFIG_FILE, read_config
from moelpr.families.tables import stacked_part
from moelpr.process.command import deferred_signals
from moelpr.process.errors import UserError, first_line
from moelpr.store import checksums
from moelpr.store.checksums import FileSum, Verifier, Verify
from moelpr.store.files import DurableFile, parse_json

# Weight files are STEM.safetensors, or STEM-00001-of-00002.safetensors, … with STEM.safetensors.index.json.
MODEL_STEM = "model"

# The files of a model other than its weights. No code (*.py): nothing here needs trust_remote_code.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# What replaces the model's own if its tokenizer is extended.
EXTENDED_FILES = (*TOKENIZER_FILES, VOCABULARY_EXTENSION_FILE, "chat_template.jinja", "chat_template.json")
COMPANION_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    *EXTENDED_FILES,
    "README.md",
    "LICENSE",
    "NOTICE",
)
COMPANION_FOLDERS = ("additional_chat_templates",)

# A file is reopened after this many bytes: while it is open, its mapped pages count as memory of this process.
MAX_MAPPED_BYTES = 32 << 20

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """UserError if the folder's tokenizer cannot be read or has more IDs than the embedding has rows."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    tokenizer = open_hf_tokenizer(folder)
    check_text_is_kept(folder, tokenizer)
    num_ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_ids > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {num_ids:,} IDs, but the model's embedding has {vocab_size:,} rows; use "
            "the tokenizer that the model was trained with, or resize the embedding"
        )


class HfReader:
    """The weights in a folder: names, shapes and dtypes from the files' headers, tensors on demand.

    Parts of stacked experts are tensors too, under the names of `stacked_part`.

    Attributes:
        names: Names of the tensors, file by file.

    Raises:
        UserError: files are missing, damaged or pickled, or (on access) a tensor is missing or quantized.
    """

    def __init__(self, folder: Path, stem: str = MODEL_STEM, verify: Verify = Verify.FULL):
        self.folder = folder
        self._headers: dict[str, tuple[str, str, tuple[int, ...]]] = {}  # file, dtype, shape
        self._open_name: str | None = None
        self._open_file: Any = None
        self._mapped_bytes = 0
        self._verifier = Verifier(folder, "copy or download it again", verify)
        index_file = folder / f"{stem}.safetensors.index.json"
        weight_map = _read_index(index_file)
        for file_name in sorted(set(weight_map.values())) or [_single_file(folder, stem)]:
            file = self._open(file_name)
            for name in file.keys():
                if name in self._headers:
                    raise UserError(f"{folder}: {self._headers[name][0]} and {file_name} both contain {name}")
                view = file.get_slice(name)
                self._headers[name] = (file_name, view.get_dtype(), tuple(view.get_shape()))
        for name, file_name in weight_map.items():
            if name not in self._headers or self._headers[name][0] != file_name:
                raise UserError(f"{index_file} lists {name} in {file_name}, which lacks it; download it again")
        self.names = list(self._headers)

    def __contains__(self, name: str) -> bool:
        return name in self._headers or stacked_part(name)[0] in self._headers

    def list_parts(self, parts: Iterable[str]) -> None:
        """In `names`, replace every stacked tensor that one of `parts` is in by its parts."""
        parts_of: dict[str, list[str]] = {}
        for part in parts:
            stack, index = stacked_part(part)
            if index:
                parts_of.setdefault(stack, []).append(part)
        self.names = [part for name in self.names for part in parts_of.get(name, [name])]

    def shape(self, name: str) -> tuple[int, ...]:
        shape, (_, index) = self._header(name)[2], self._stored(name)
        if len(index) > len(shape):
            raise UserError(f"{self.folder}: the tensor with {name} has shape {list(shape)}; download it again")
        return tuple(torch.empty(shape, device="meta")[index].shape)

    def dtype(self, name: str) -> torch.dtype:
        kind = self._header(name)[1]
        if kind not in _DTYPES:
            raise UserError(
                f"{self.folder}: the dtype of {name} must be one of {', '.join(_DTYPES)}, got {kind}; "
                "convert the unquantized model"
            )
        return _DTYPES[kind]

    def read(self, name: str) -> Tensor:
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self._open_name = None
        self.dtype(name)  # refused unless it is a dtype that fp32 holds
        file_name = self._header(name)[0]
        self._verifier.verify(file_name)
        stored, index = self._stored(name)
        file = self._open(file_name)
        with deferred_signals():  # the library calls torch, which makes an exception of a handler another one
            # Without the copy, a slice would keep its whole stack mapped.
            tensor: Tensor = file.get_slice(stored)[index].clone() if index else file.get_tensor(stored)
        self._mapped_bytes += tensor.nbytes
        return tensor

    def _stored(self, name: str) -> tuple[str, tuple[Any, ...]]:
        """The stored tensor that `name` is in, and its index; a delta stores parts by themselves."""
        return (name, ()) if name in self._headers else stacked_part(name)

    def _header(self, name: str) -> tuple[str, str, tuple[int, ...]]:
        """Of the tensor, or of the stacked one that it is a part of."""
        stored, index = self._stored(name)
        header = self._headers.get(stored)
        if header is None or (index and header[2][:1] <= index[:1]):  # fewer experts
            raise UserError(f"{self.folder} lacks the tensor {name}; download the model again")
        return header

    def _open(self, name: str) -> Any:
        if self._open_name != name:
            try:
                with deferred_signals():
                    self._open_file = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self.folder / name} is truncated or damaged ({first_line(error)}); download it again"
                ) from error
            self._open_name = name
            self._mapped_bytes = 0
        return self._open_file


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → file; empty if there is no index."""
    if not path.is_file():
        return {}
    try:
        weight_map = dict(parse_json(path.read_text())["weight_map"])
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("a file name is not text")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; download it again") from error
    single = path.with_name(path.name.removesuffix(".index.json"))
    if single.is_file() and set(weight_map.values()) != {single.name}:
        raise UserError(
            f"{single}, which transformers reads, stands beside {path.name} of other files; remove the stale one"
        )
    for name in weight_map.values():
        if Path(name).name != name or not (path.parent / name).is_file():
            raise UserError(f"{path} lists {name}, which is missing; download it again")
    return weight_map


def _single_file(folder: Path, stem: str) -> str:
    name = f"{stem}.safetensors"
    if (folder / name).is_file():
        return name
    if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.glob("*")):
        raise UserError(
            f"{folder} contains only pickled weights, which could run code when opened; convert them to "
            "safetensors (load with transformers, then save_pretrained)"
        )
    if any(folder.glob("*.gguf")):
        raise UserError(f"{folder} contains only GGUF weights; pass the safetensors that they were made from")
    raise UserError(
        f"{folder} contains no weights: neither {name} nor {name}.index.json exists; download them, or convert .bin "
        "weights to safetensors"
    )


def common_dtype(tensors: Iterable[tuple[HfReader, str]]) -> str:
    """The dtype of all tensors, each a reader and a name; UserError if they have several."""
    folders = {str(reader.dtype(name)).removeprefix("torch."): reader.folder for reader, name in tensors}
    if len(folders) > 1:
        found = " and ".join(f"{dtype} ({folder})" for dtype, folder in sorted(folders.items()))
        raise UserError(f"the tensors mix {found}; choose one with --dtype; float32 is lossless")
    return next(iter(folders))


def record_dtype(folder: Path, tensors: Iterable[tuple[HfReader, str]]) -> None:
    """Make a copied config.json name the dtype of the model's weights, as deltas depend on what training rounded.

    If they have several, it is float32, which holds all of them.
    """
    dtypes = {str(reader.dtype(name)).removeprefix("torch.") for reader, name in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    config = read_config(folder)
    if (config.get("dtype") or config.get("torch_dtype")) != dtype:
        config |= {"dtype": dtype, "torch_dtype": dtype}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def is_unread(source: HfReader, name: str) -> bool:
    """Whether readers ignore this tensor, if the model is tied.

    Old models store RoPE's frequencies, some tied models an output layer that is a copy of the embedding, and
    transformers a Qwen2-MoE's shared expert without elements.
    """
    if name.endswith(".rotary_emb.inv_freq") or 0 in source.shape(name):
        return True
    embedding = "model.embed_tokens.weight"
    return (
        name == "lm_head.weight"
        and source.shape(name) == source.shape(embedding)
        and torch.equal(source.read(name), source.read(embedding))
    )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements as they are stored in a file."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a safetensors file, and the tensors (name, shape) whose bytes it consists of."""

    name: str
    shape: tuple[int, ...]
    parts: list[tuple[str, tuple[int, ...]]]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def _stored_tensors(tensors: Iterable[tuple[str, tuple[int, ...]]], stack: bool) -> list[_StoredTensor]:
    """Join the parts of stacked experts, unless they are to be stored by themselves."""
    stored = []
    for name, group in groupby(tensors, key=lambda tensor: stacked_part(tensor[0])[0] if stack else tensor[0]):
        parts = list(group)
        shape = parts[0][1]
        if parts[0][0] != name:
            experts = [stacked_part(part)[1][0] for part, _ in parts]
            rows = sum(part_shape[0] for _, part_shape in parts) // len(set(experts))
            shape = (len(set(experts)), rows, *shape[1:])
        stored.append(_StoredTensor(name, shape, parts))
    return stored


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    max_shard_bytes: float,
    read: Callable[[str], Tensor],
    bar: "tqdm[None]",
    stem: str = MODEL_STEM,
    stack: bool = True,
) -> None:
    """Write safetensors shards, index and checksums, one tensor at a time; shards of an interrupted call are kept.

    Args:
        tensors: (name, shape) of all tensors, in the order in which they are written.
        dtype: Their dtype in the files.
        max_shard_bytes: Largest size of a shard; a larger tensor gets its own.
        read: Returns the tensor of a name, in any dtype.
        bar: Progress in bytes.
        stack: Whether parts of stacked experts become one tensor; if so, all of them follow one another.
    """
    shards: list[list[_StoredTensor]] = [[]]
    total_size = filled = 0
    for tensor in _stored_tensors(tensors, stack):
        nbytes = tensor.num_elements * dtype.itemsize
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
        total_size += nbytes
    weight_map: dict[str, str] = {}
    sums = checksums.read(folder) or {}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"{stem}{suffix}.safetensors"
        weight_map |= {tensor.name: path.name for tensor in shard}
        if path.is_file():
            bar.update(sum(tensor.num_elements for tensor in shard) * dtype.itemsize)
            sums.setdefault(path.name, FileSum.of(path))
        else:
            sums[path.name] = _write_shard(path, shard, dtype, read, bar)
        checksums.write(folder, sums)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    path: Path, shard: list[_StoredTensor], dtype: torch.dtype, read: Callable[[str], Tensor], bar: "tqdm[None]"
) -> FileSum:
    """Stream one file, which gets its name once complete; returns its checksum.

    The safetensors library needs all tensors of a file at once. But a file is a JSON header followed by the bytes, so
    tensors can be streamed if their names, shapes and dtype are known first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored in shard:
        start, end = end, end + stored.num_elements * dtype.itemsize
        header[stored.name] = {
            "dtype": _DTYPE_NAMES[dtype], "shape": list(stored.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    unfinished = path.with_name(path.name + ".unfinished")
    with closing(DurableFile(unfinished)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in (part for stored in shard for part in stored.parts):
            tensor = cast(read(name), dtype, name)
            assert tensor.shape == shape, (name, tensor.shape, shape)
            bar.update(file.write(raw_bytes(tensor)))
            del tensor  # one in memory
        found = FileSum(file.tell(), f"{file.crc32:08x}")
        file.finish()
    os.replace(unfinished, path)
    return found
