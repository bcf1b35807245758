"""GGUF files of exports, for llama.cpp, Ollama and LM Studio."""

from pathlib import Path

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")


def gguf_folder(export: Path) -> Path:
    """The folder of an export's GGUF files, next to it."""
    return export.with_name(f"{export.name}-gguf")
