"""config.json of a Hugging Face model."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.model_code import without_code
from moelpr.base.records import FOREIGN
from moelpr.model.model_spec import FILE_NAME, MAX_LAYERS

CONFIG_FILE = "config.json"
_ADAPTER_FILE = "adapter_config.json"
_REMEDY = "download it again"

# Multimodal classes, and the class of each one's language model, whose tensors have a longer name there.
TEXT_CLASSES = {
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
}
TEXT_PREFIX, _OTHER_PREFIXES = "model.language_model.", ("model.visual.", "mtp.")
# Keys next to the parts in the config.json of a multimodal model.
_COMMON_KEYS = "dtype torch_dtype vision_config quantization_config quantization transformers_weights".split()


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
    """A folder's config.json, or that of its language model, without what names code; UserError if it is damaged."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
            raise UserError(
                f"{folder} is a GGUF, which only llama.cpp reads; pass the Hugging Face directory that it was made from"
            )
        raise UserError(f"there is no {path}; pass the folder that hf download NAME --local-dir DIR or moelpr made")
    config = without_code(records.read(dict[str, Any], path, _REMEDY))
    records.validate(_Config, config, str(path), _REMEDY)
    text = _language_model(config, path)
    records.validate(_Config, text, str(path), _REMEDY)
    return text


def is_gguf(path: Path) -> bool:
    """Whether `path` is a model of llama.cpp."""
    return path.suffix == ".gguf" and path.is_file()


def check_model(folder: Path, *, is_hf: bool = False) -> None:
    """Check that this is a model, before anything slow is imported.

    Args:
        is_hf: Whether it must be a Hugging Face directory, not a checkpoint, an adapter or a GGUF file.

    Raises:
        UserError: It has none, or no weights in safetensors.
    """
    is_checkpoint = (folder / FILE_NAME).is_file()
    if not is_hf and (is_checkpoint or is_gguf(folder) or (folder / _ADAPTER_FILE).is_file()):
        return
    if is_checkpoint:
        raise UserError(f"{folder} is a Megatron checkpoint; export it with moelpr model export and pass the export")
    read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} contains no weights in *.safetensors; download them, or load others, which may be pickled, with "
            "transformers and save them with save_pretrained"
        )


def transformers_config(folder: Path) -> Any:
    """The folder's config.json as an object of transformers, without what names code; UserError with an adapter."""
    from transformers import AutoConfig

    if (folder / _ADAPTER_FILE).is_file():  # transformers would read the model that this names
        raise UserError(f"{folder} has an adapter, {_ADAPTER_FILE}; merge it into the model, or move it away")
    settings = records.read(dict[str, Any], folder / CONFIG_FILE, _REMEDY)
    has_code = (kept := without_code(settings)) != settings
    with TemporaryDirectory() if has_code else nullcontext(folder) as source:
        if has_code:
            (Path(source) / CONFIG_FILE).write_text(json.dumps(kept))
        # Without `trust_remote_code`, transformers would ask at a terminal.
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def text_names(names: Iterable[str], text: bool = True) -> dict[str, str]:
    """The names of a language model's tensors → their names in the files, which may be a multimodal model's.

    With `text` false, those of a multimodal model's other tensors.
    """
    names = list(names)
    if not text:
        return {name: name for name in names if name.startswith(_OTHER_PREFIXES)}
    if not any(name.startswith(TEXT_PREFIX) for name in names):
        return {name: name for name in names}
    return {
        name.replace(TEXT_PREFIX, "model.", 1) if name.startswith(TEXT_PREFIX) else name: name
        for name in names
        if not name.startswith(_OTHER_PREFIXES)
    }


def _language_model(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config.json that the language model would have by itself."""
    text_class = next((TEXT_CLASSES[name] for name in config.get("architectures") or () if name in TEXT_CLASSES), None)
    text = config.get("text_config")
    if text_class is None:
        return config
    if not isinstance(text, dict):
        raise UserError(f"{path} lacks text_config, the shape of the language model; {_REMEDY}")
    ties = {part["tie_word_embeddings"] for part in (config, text) if "tie_word_embeddings" in part}
    if len(ties) > 1:
        raise UserError(f"{path} has tie_word_embeddings both true and false, in text_config and beside it; {_REMEDY}")
    common = {key: config[key] for key in _COMMON_KEYS if key in config}
    kept = {key: value for key, value in text.items() if not key.startswith("mtp_")}
    return {**common, **kept, "tie_word_embeddings": ties == {True}, "architectures": [text_class]}
