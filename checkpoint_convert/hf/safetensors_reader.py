"""The weights of a Hugging Face model directory: safetensors files, read tensor by tensor."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint_convert.common.numbers import check_finite
from checkpoint_convert.hf.model_files import MODEL_STEM
from moelpr.base import records
from moelpr.base.checksums import Verifier, Verify
from moelpr.base.command import deferred_signals
from moelpr.base.errors import UserError, first_line
from moelpr.measure.evaluate.models import WeightIndex
from moelpr.model.families.hf_config import text_names
from moelpr.model.families.tables import stacked_part

# A file is reopened after this many bytes: while it is open, its mapped pages count as memory of this process.
MAX_MAPPED_BYTES = 32 << 20

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HfReader:
    """The weights in a folder: names, shapes and dtypes from the files' headers, tensors on demand.

    Parts of stacked experts are tensors too, under the names of `stacked_part`. Of a multimodal model, these are the
    tensors of its language model, under the names that they have in a model by itself; with `text` false, the others.

    Attributes:
        names: Names of the tensors, file by file.

    Raises:
        UserError: files are missing, damaged or pickled, or (on access) a tensor is missing or quantized.
    """

    def __init__(self, folder: Path, verify: Verify = Verify.FULL, text: bool = True):
        self.folder = folder
        self._headers: dict[str, tuple[str, str, tuple[int, ...]]] = {}  # file, dtype, shape
        self._open_name: str | None = None
        self._open_file: Any = None
        self._mapped_bytes = 0
        self._verifier = Verifier(folder, "copy or download it again", verify)
        index_file = folder / f"{MODEL_STEM}.safetensors.index.json"
        weight_map = _read_index(index_file)
        for file_name in sorted(set(weight_map.values())) or [_single_file(folder)]:
            file = self._open(file_name)
            for name in file.keys():
                if name in self._headers:
                    raise UserError(f"{folder}: {self._headers[name][0]} and {file_name} both contain {name}")
                view = file.get_slice(name)
                self._headers[name] = (file_name, view.get_dtype(), tuple(view.get_shape()))
        for name, file_name in weight_map.items():
            if name not in self._headers or self._headers[name][0] != file_name:
                raise UserError(f"{index_file} lists {name} in {file_name}, which lacks it; download it again")
        self._name_in_file = text_names(self._headers, text)
        self._headers = {name: self._headers[in_file] for name, in_file in self._name_in_file.items()}
        self.names = list(self._headers)

    def __contains__(self, name: str) -> bool:
        return stacked_part(name)[0] in self._headers

    def list_parts(self, parts: Iterable[str]) -> None:
        """In `names`, replace every stacked tensor that one of `parts` is in by its parts."""
        parts_of: dict[str, list[str]] = {}
        for part in parts:
            stack, index = stacked_part(part)
            if index:
                parts_of.setdefault(stack, []).append(part)
        self.names = [part for name in self.names for part in parts_of.get(name, [name])]

    def shape(self, name: str) -> tuple[int, ...]:
        shape, (_, index) = self._header(name)[2], stacked_part(name)
        if len(index) > len(shape):
            raise UserError(f"{self.folder}: the tensor with {name} has shape {list(shape)}; download it again")
        return tuple(torch.empty(shape, device="meta")[index].shape)

    def dtype(self, name: str) -> torch.dtype:
        if (kind := self._header(name)[1]) not in DTYPES:
            raise UserError(
                f"{self.folder}: the dtype of {name} must be one of {', '.join(DTYPES)}, got {kind}; "
                "convert the unquantized model"
            )
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self._open_name = None
        self.dtype(name)  # refused unless it is a dtype that fp32 holds
        file_name = self._header(name)[0]
        self._verifier.verify(file_name)
        stored, index = stacked_part(name)
        file = self._open(file_name)
        with deferred_signals():  # the library calls torch, which makes an exception of a handler another one
            # Without the copy, a slice would keep its whole stack mapped.
            in_file = self._name_in_file[stored]
            tensor: Tensor = file.get_slice(in_file)[index].clone() if index else file.get_tensor(in_file)
        self._mapped_bytes += tensor.nbytes
        return tensor

    def read_finite(self, name: str) -> Tensor:
        """Like `read`, but UserError if the tensor contains NaN or Inf."""
        return check_finite(self.read(name), f"{self.folder}: {name}", "download the model again or use another one")

    def _header(self, name: str) -> tuple[str, str, tuple[int, ...]]:
        """The file, dtype and shape of the tensor, or of the stacked one that it is a part of."""
        stored, index = stacked_part(name)
        header = self._headers.get(stored)
        is_expert = bool(index) and isinstance(index[0], int)
        if header is None or (is_expert and header[2][:1] <= index[:1]):  # fewer experts
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
    """The file that each tensor is in; empty if there is no index."""
    if not path.is_file():
        return {}
    weight_map = records.read(WeightIndex, path, "download it again").weight_map
    single = path.with_name(path.name.removesuffix(".index.json"))
    if single.is_file() and set(weight_map.values()) != {single.name}:
        raise UserError(
            f"{single}, which transformers reads, is next to {path.name} of other files; remove the stale one"
        )
    for name in weight_map.values():
        if Path(name).name != name or not (path.parent / name).is_file():
            raise UserError(f"{path} lists {name}, which is missing; download it again")
    return weight_map


def _single_file(folder: Path) -> str:
    name = f"{MODEL_STEM}.safetensors"
    if (folder / name).is_file():
        return name
    raise UserError(
        f"{folder} contains no weights: neither {name} nor {name}.index.json exists; download them, or convert pickled "
        "ones to safetensors"
    )


def common_dtype(tensors: Iterable[tuple[HfReader, str]]) -> str:
    """The dtype of all tensors, each a reader and a name; UserError if they have several."""
    folders = {str(reader.dtype(name)).removeprefix("torch."): reader.folder for reader, name in tensors}
    if len(folders) > 1:
        dtypes = " and ".join(f"{dtype} ({folder})" for dtype, folder in sorted(folders.items()))
        raise UserError(f"the tensors mix {dtypes}; choose one with --dtype; float32 is lossless")
    return next(iter(folders))


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
