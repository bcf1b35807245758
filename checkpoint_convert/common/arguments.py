"""Flags that several converters have."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moelpr.base.checksums import NO_VERIFY
from moelpr.base.errors import UserError
from moelpr.data.text.sources import named_files
from moelpr.measure.evaluate.arguments import at_least, named_paths
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


def add_routing_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of routers in closed form."""
    add = parser.add_argument
    what = "most KL(base‖model) on held-out text to keep, in nats per token, for which as much as possible of what "
    what += "was learned is kept (default: the smallest sum of this distance and the loss of expanded text)"
    add("--max-distance", type=float, metavar="NATS", help=what)
    what = "instead, the fraction of what was learned for which the distance from the base is to be smallest"
    add("--keep", type=float, metavar="FRACTION", help=what)
    what = "tokens of each text (default: %(default)s)"
    add("--max-tokens", type=at_least(100), default=2048, metavar="N", help=what)
    add("--json-key", default="text", metavar="KEY", help="key of the text (default: %(default)s)")
    what = "cpu, cuda, cuda:N or auto: a GPU if any, and as many as the model needs (default: auto)"
    add("--device", default="auto", help=what)
    what = "of the computation; auto: float32 on a CPU, the model's own on a GPU (default: %(default)s)"
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help=what)


def check_routing_options(args: argparse.Namespace) -> None:
    """Check their values."""
    if args.max_distance is not None and args.keep is not None:
        raise UserError("--max-distance and --keep ask for two things; pass one of them")
    if args.max_distance is not None and not args.max_distance > 0:
        raise UserError(f"--max-distance must be positive, got {args.max_distance}")
    if args.keep is not None and not 0 < args.keep <= 1:
        raise UserError(f"--keep must be above 0 and at most 1, got {args.keep}")


def named_texts(items: Sequence[str], flag: str) -> dict[str, str]:
    """The files of a flag by name; without a name, each file is a text, named like it."""
    pairs = [
        pair
        for item in items
        for pair in ([item] if "=" in item else [f"{name}={path}" for name, path in named_files([item], flag).items()])
    ]
    return named_paths(pairs, flag)
