"""GGUF files of exports, for llama.cpp, Ollama and LM Studio."""

from pathlib import Path
from typing import Literal

from moelpr.base.settings import Flags

Type = Literal["Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"]


class GgufFlags(Flags):
    """GGUF"""

    quantize: list[Type] = []  # also write the file in fewer bits
    ollama: bool = False  # also write Ollama's Modelfile, with the chat template and its stops


def gguf_folder(export: Path) -> Path:
    """The folder of an export's GGUF files, next to it."""
    return export.with_name(f"{export.name}-gguf")
