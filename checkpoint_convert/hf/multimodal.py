"""The parts of a multimodal model that are not its language model, which an export takes over bit for bit.

They are the vision tower and the head that predicts further tokens (MTP). transformers, vLLM and MLX read the whole; a
head is only used if a program is told to, as it was trained with the base.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint_convert.hf.safetensors_reader import HfReader
from checkpoint_convert.hf.safetensors_writer import Tensors
from moelpr.base import records
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.model_code import without_code
from moelpr.model.families.families import read_base
from moelpr.model.families.hf_config import CONFIG_FILE, TEXT_CLASSES, TEXT_PREFIX
from moelpr.model.model_spec import ModelSpec

# Files from which the processors of images and videos are read.
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_HEAD = "mtp."


@dataclass(frozen=True)
class MultimodalBase:
    """A multimodal checkpoint: its config.json and the tensors next to those of its language model."""

    folder: Path
    config: dict[str, Any]
    reader: HfReader

    @classmethod
    def read(cls, folder: Path, spec: ModelSpec, dtype: torch.dtype, verify: Verify = Verify.FULL) -> "MultimodalBase":
        """Open a checkpoint whose language model became `spec`, exported in `dtype`.

        Raises:
            UserError: It is not multimodal, has another shape, or has a head that its config.json does not describe.
        """
        base = read_base(folder)[1]
        config = without_code(records.read(dict[str, Any], folder / CONFIG_FILE, "download it again"))
        if "text_config" not in config:
            raise UserError(
                f"--multimodal-base {folder} is a language model only; pass the multimodal base, or remove it"
            )
        for name, value in base.megatron_args.items():
            if name != "vocab_size" and (actual := spec.megatron_args.get(name)) != value:
                raise UserError(
                    f"--multimodal-base {folder} is not the base: its {name} is {value}, the model's {actual}"
                )
        reader = HfReader(folder, verify=verify, text=False)
        heads = {int(name.split(".")[2]) for name in reader.names if name.startswith(f"{_HEAD}layers.")}
        described = config["text_config"].get("mtp_num_hidden_layers", 0)
        if heads != set(range(described)):
            raise UserError(
                f"{folder}/{CONFIG_FILE} has mtp_num_hidden_layers {described}, but the files contain {len(heads)} "
                "layers of the head; download it again"
            )
        for name in reader.names:
            if (actual := reader.dtype(name)) != dtype:
                raise UserError(
                    f"{name} of --multimodal-base {folder} is {str(actual).removeprefix('torch.')}; export with"
                    f" --dtype {str(actual).removeprefix('torch.')} to keep its bits"
                )
        return cls(folder, config, reader)

    def with_text(self, text: dict[str, Any]) -> dict[str, Any]:
        """config.json of the whole, from that of the exported language model."""
        text = {key: value for key, value in text.items() if key != "vision_config"}
        (architecture,) = text.pop("architectures")
        kind = text["model_type"].removesuffix("_text")
        head = {key: value for key, value in self.config["text_config"].items() if key.startswith("mtp_")}
        return {
            **self.config,
            **{key: text[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings")},
            "architectures": [next(whole for whole, part in TEXT_CLASSES.items() if part == architecture)],
            "model_type": kind,
            "text_config": text | head,
            "vision_config": self.config["vision_config"] | {"model_type": f"{kind}_vision"},
        }

    def with_tensors(self, text: Tensors) -> Tensors:
        """The tensors of the whole, from those of the language model."""
        names = {re.sub(r"^model\.", TEXT_PREFIX, name): name for name in text.shapes}
        shapes = {name: text.shapes[text_name] for name, text_name in names.items()}
        shapes |= {name: self.reader.shape(name) for name in self.reader.names}
        return Tensors(shapes, lambda name: text.read(names[name]) if name in names else self.reader.read(name))
