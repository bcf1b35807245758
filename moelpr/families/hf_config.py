"""config.json of a Hugging Face model."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.model_spec import MAX_LAYERS
from moelpr.process.errors import UserError
from moelpr.store import records
from moelpr.store.records import FOREIGN

CONFIG_FILE = "config.json"
_REMEDY = "download it again"


@dataclass(frozen=True, config=FOREIGN)
class _Config:
    """The fields of config.json that are used before transformers has checked them."""

    model_type: str | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    # transformers builds a list of this length.
    num_hidden_layers: Annotated[int, Field(le=MAX_LAYERS)] | None = None
    architectures: list[str] | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """Read the folder's config.json.

    Raises:
        UserError: It is missing, is not a JSON object, or has a field of a wrong type or more than MAX_LAYERS layers.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
            raise UserError(
                f"{folder} is a GGUF, which only llama.cpp reads; pass the Hugging Face directory that it was made from"
            )
        raise UserError(f"there is no {path}; pass the folder that hf download NAME --local-dir DIR made")
    config = records.read(dict[str, Any], path, _REMEDY)
    records.validate(_Config, config, str(path), _REMEDY)
    return config
