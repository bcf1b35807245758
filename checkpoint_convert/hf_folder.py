"""Hugging Face model directories: config.json, tokenizer, and safetensors weights, streamed tensor by tensor."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from moelpr.errors import UserError
from moelpr.families.families import CONFIG_FILE
from moelpr.files import DurableFile

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
COMPANION_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    "LICENSE",
    "NOTICE",
)
COMPANION_FOLDERS = ("additional_chat_templates",)

# A file is reopened after this many bytes: while it is open, its mapped pages count as memory of this process.
MAX_MAPPED_BYTES = 32 << 20

# Suffix of a shard that is being written.
_UNFINISHED = ".unfinished"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def copy_companions(source: Path, target: Path, skip: tuple[str, ...] = ()) -> None:
    """Copy config, tokenizer, chat template and model card, but no weights."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COMPANION_FILES:
        if name not in skip and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in COMPANION_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """UserError if the folder's tokenizer cannot be read or has more IDs than the embedding has rows."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged tokenizer may raise any exception
        raise UserError(f"transformers cannot read the tokenizer in {folder}: {_first_line(error)}") from error
    num_ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_ids > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {num_ids:,} IDs, but the model's embedding has {vocab_size:,} rows; use "
            "the tokenizer that the model was trained with, or resize the embedding"
        )


class HfReader:
    """The weights in a folder: names, shapes and dtypes from the files' headers, tensors on demand.

    Args:
        folder: Folder of safetensors files.
        stem: Stem of their names.

    Raises:
        UserError: files are missing, damaged or pickled, or (on access) a tensor is missing or quantized.
    """

    def __init__(self, folder: Path, stem: str = MODEL_STEM):
        self.folder = folder
        self._single_file, self._index_file = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self._files: dict[str, str] = {}
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._open_name: str | None = None
        self._open_file: Any = None
        self._mapped_bytes = 0
        names, index = self._shard_names()
        for name in names:
            file = self._open(name)
            for key in file.keys():
                view = file.get_slice(key)
                if key in self._files:
                    raise UserError(f"{folder}: {self._files[key]} and {name} both contain {key}")
                self._files[key] = name
                self._headers[key] = (view.get_dtype(), tuple(view.get_shape()))
        for key, name in index.items():
            if self._files.get(key) != name:
                raise UserError(f"{folder / self._index_file} lists {key} in {name}, which lacks it; download it again")

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        kind = self._header(name)[0]
        if kind not in _DTYPES:
            raise UserError(
                f"{self.folder}: the dtype of {name} must be one of {', '.join(_DTYPES)}, got {kind}; "
                "convert the unquantized model"
            )
        return _DTYPES[kind]

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        self._header(name)
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self._open_name = None
        self._mapped_bytes += self.nbytes(name)
        return self._open(self._files[name]).get_tensor(name)

    def _header(self, name: str) -> tuple[str, tuple[int, ...]]:
        if name not in self._headers:
            raise UserError(f"{self.folder} lacks the tensor {name}; download the model again")
        return self._headers[name]

    def _shard_names(self) -> tuple[list[str], dict[str, str]]:
        """The safetensors files of the folder, and the index (tensor → file) if there is one."""
        folder, index_file = self.folder, self.folder / self._index_file
        if index_file.is_file():
            try:
                index = dict(json.loads(index_file.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index_file} is damaged; download it again") from error
            names = sorted(set(index.values()))
            for name in names:
                if Path(name).name != name or not (folder / name).is_file():
                    raise UserError(f"{index_file} lists {name}, which is missing; download it again")
            return names, index
        if (folder / self._single_file).is_file():
            return [self._single_file], {}
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise UserError(
                f"{folder} contains only pickled weights, which could run code when opened; convert them to "
                "safetensors (load with transformers, then save_pretrained)"
            )
        raise UserError(f"{folder} contains no weights: neither {self._single_file} nor {index_file.name} exists")

    def _open(self, name: str) -> Any:
        if self._open_name != name:
            try:
                self._open_file = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self.folder / name} is truncated or damaged ({_first_line(error)}); download it again"
                ) from error
            self._open_name = name
            self._mapped_bytes = 0
        return self._open_file


def is_unread(source: HfReader, name: str) -> bool:
    """Whether readers ignore this tensor of a tied model.

    Old models store RoPE's frequencies, and some tied models an output layer that is a copy of the embedding.
    """
    embedding = "model.embed_tokens.weight"
    return name.endswith(".rotary_emb.inv_freq") or (
        name == "lm_head.weight"
        and source.shape(name) == source.shape(embedding)
        and torch.equal(source.read(name), source.read(embedding))
    )


class HfWriter:
    """Writes safetensors shards and their index, one tensor at a time; an interrupted writer's shards are kept.

    The safetensors library needs all tensors of a file at once. But a file is a JSON header followed by the bytes, so
    tensors can be streamed if their names, shapes and dtype are declared first. A shard gets its name once complete.

    Args:
        folder: Folder to write to.
        tensors: (name, shape) of all tensors, in the order in which they are written.
        dtype: Their dtype.
        max_shard_bytes: Largest size of a shard; a larger tensor gets its own.
        stem: Stem of the file names.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Iterable[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype,
        max_shard_bytes: float,
        stem: str = MODEL_STEM,
    ):
        self._folder = folder
        self._stem = stem
        self.dtype = dtype
        self._shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
        self.total_bytes = filled = 0
        for name, shape in tensors:
            nbytes = math.prod(shape) * dtype.itemsize
            if self._shards[-1] and filled + nbytes > max_shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append((name, shape))
            filled += nbytes
            self.total_bytes += nbytes
        self._shard_of = {name: k for k, shard in enumerate(self._shards) for name, _ in shard}
        self._complete = {k for k in range(len(self._shards)) if (folder / self._name(k)).is_file()}
        self._file: DurableFile | None = None
        self._shard = -1
        self._position = 0

    def __enter__(self) -> "HfWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def is_written(self, name: str) -> bool:
        """Whether the tensor's shard is complete; such a tensor must not be written again."""
        return self._shard_of[name] in self._complete

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor in the declared order."""
        if self._file is None:
            self._start_shard(self._shard_of[name])
        expected = self._shards[self._shard][self._position]
        assert expected == (name, tuple(tensor.shape)) and tensor.dtype == self.dtype, (expected, name, tensor.shape)
        assert self._file is not None
        self._file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B"))
        self._position += 1
        if self._position == len(self._shards[self._shard]):
            self._finish_shard()

    def write_all(self, read: Callable[[str], Tensor], bar: "tqdm[None]") -> None:
        """Write every tensor that is not yet written, and the index.

        Args:
            read: Returns the tensor of a name, in any dtype.
            bar: Progress in bytes.
        """
        for shard in self._shards:
            for name, shape in shard:
                if not self.is_written(name):
                    self.write(name, read(name).to(self.dtype))
                bar.update(math.prod(shape) * self.dtype.itemsize)
        self.finish()

    def finish(self) -> None:
        """Write the index if there are several shards."""
        assert self._file is None and len(self._complete) == len(self._shards)
        if len(self._shards) == 1:
            return
        weight_map = {name: self._name(k) for name, k in self._shard_of.items()}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / f"{self._stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _start_shard(self, shard: int) -> None:
        self._shard = shard
        self._position = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self._shards[shard]:
            start, end = end, end + math.prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[self.dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
        self._file = DurableFile(self._folder / (self._name(shard) + _UNFINISHED))
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.finish()
        os.replace(self._folder / self._file.name, self._folder / self._name(self._shard))
        self._file = None
        self._complete.add(self._shard)

    def _name(self, shard: int) -> str:
        number = "" if len(self._shards) == 1 else f"-{shard + 1:05}-of-{len(self._shards):05}"
        return f"{self._stem}{number}.safetensors"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
