"""Flags that several converters have."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moelpr.base.checksums import NO_VERIFY
from moelpr.model.model_spec import DTYPES


def add_output_options(parser: argparse.ArgumentParser, output: str, dtype_default: str | None = None) -> None:
    """Add --save, --overwrite, --no-verify and, with a text for its default, --dtype."""
    add = parser.add_argument
    add("--save", type=Path, required=True, metavar="DIR", help=f"{output} to write")
    if dtype_default:
        add("--dtype", choices=DTYPES, help=f"dtype of the output (default: {dtype_default})")
    add("--overwrite", action="store_true", help=f"replace an existing {output} at --save")
    add("--no-verify", **NO_VERIFY)
    parser.epilog = "An interrupted command leaves .NAME.partial next to the --save folder; rerun it to resume."


def add_gguf_options(parser: argparse.ArgumentParser, types: Sequence[str]) -> None:
    """Add --quantize with the types of llama.cpp, and --ollama."""
    add = parser.add_argument
    what = f"also write the GGUF file in fewer bits: {', '.join(types)}"
    add("--quantize", nargs="+", default=[], choices=types, metavar="TYPE", help=what)
    add("--ollama", action="store_true", help="also write Ollama's Modelfile, with the chat template and its stops")
