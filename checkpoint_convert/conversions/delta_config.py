"""delta_config.json, which lists what a delta and its base are combined to."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.model_spec import DTYPES, MAX_LAYERS
from moelpr.process.errors import UserError
from moelpr.store.records import STRICT, Record

type Size = Annotated[int, Field(ge=0, lt=1 << 31)]


@dataclass(frozen=True, config=STRICT)
class DeltaTensor:
    """One tensor of the export.

    Attributes:
        name: Its name in the export.
        shape: Its shape in the export.
        source: The place of its values: "base", "delta" or "zeros".
        base: Its name in the base.
        sha256: Checksum of its bytes in the export; "" for zeros.
        new_rows: First row, and the one after the last, that the delta has of a tensor of the base; None for no row.
    """

    name: str
    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=3)]
    source: Literal["base", "delta", "zeros"]
    base: str = ""
    sha256: str = ""
    new_rows: tuple[Size, Size] | None = None

    def __post_init__(self) -> None:
        if math.prod(self.shape) >= 1 << 48:
            raise UserError(f"{self.name} is too large")
        if self.new_rows is not None and not 0 < self.new_rows[0] < self.new_rows[1]:
            raise UserError(f"new_rows of {self.name} can't be {self.new_rows}")


@dataclass(frozen=True, config=STRICT)
class DeltaConfig(Record):
    """What a delta and its base are combined to.

    Attributes:
        base_model: Name of the base.
        dtype: Dtype of the export.
        max_shard_bytes: Largest size of a safetensors file of the export.
        experts: Numbers and layers of the experts, for human readers.
        config: config.json of the export.
        card: README.md of the export.
        tensors: The tensors in the order of the export; fields that are empty are omitted.
    """

    FILE_NAME: ClassVar[str] = "delta_config.json"
    REMEDY: ClassVar[str] = "copy the delta again"
    INDENT: ClassVar[int | None] = 1

    base_model: str
    dtype: str
    max_shard_bytes: Annotated[int, Field(ge=0)]
    experts: dict[str, Any]
    config: dict[str, Any]
    card: str
    tensors: Annotated[tuple[DeltaTensor, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        architectures, layers = self.config.get("architectures"), self.config.get("num_hidden_layers", 0)
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
            raise UserError(f"config.architectures must be a list of class names, got {architectures}")
        if not isinstance(layers, int) or not 0 <= layers <= MAX_LAYERS:
            raise UserError(f"config.num_hidden_layers must be at most {MAX_LAYERS}, got {layers}")
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise UserError("a tensor is listed twice")

    def as_json(self) -> dict[str, Any]:
        tensors = [
            {key: value for key, value in vars(tensor).items() if value not in ("", None)} for tensor in self.tensors
        ]
        return {"format_version": self.format_version, **vars(self), "tensors": tensors}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read delta_config.json; UserError if it is missing, damaged or of another version."""
        if not (folder / cls.FILE_NAME).is_file():
            raise UserError(f"{folder} is not a delta: it has no {cls.FILE_NAME}; mcore_to_hf.py --delta writes one")
        return super().read(folder)
