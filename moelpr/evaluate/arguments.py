"""Flags that evaluation on text and the routing maps share."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moelpr.errors import UserError


@dataclass(frozen=True)
class TextJob:
    """Which models are measured on which text, and how. Read from the command line by `read_text_job`."""

    models: dict[str, Path]
    files: dict[str, Path]
    original: list[str]
    arguments: argparse.Namespace


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]DIR",
        help="Hugging Face directory or Megatron checkpoint folder; repeat it",
    )  # fmt: skip
    parser.add_argument(
        "--data", action="append", required=True, metavar="LANG=FILE", help="JSON lines of held-out text; repeat it"
    )
    parser.add_argument("--original-languages", metavar="en,es,...", help="the others of --data are expanded languages")
    parser.add_argument("--json-key", default="text", help="key of the text (default: %(default)s)")
    parser.add_argument("--max-documents", type=int, metavar="N", help="documents per language (default: all)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="window in tokens (default: 512, or what the models take)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a later window of a document sees again (default: a quarter)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="full windows per batch (default: what fits in memory)"
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder for results as JSON, Markdown, HTML and SVG; given again, it goes on where it stopped",
    )  # fmt: skip


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto (default): float32 on a CPU, the model's own on a GPU",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def read_text_job(arguments: argparse.Namespace) -> TextJob:
    """Raises UserError for names given twice or missing, and numbers out of range."""
    files = named_paths(arguments.data, "--data")
    if arguments.max_documents is not None and arguments.max_documents < 1:
        raise UserError(f"--max-documents {arguments.max_documents} leaves nothing to score; give at least 1")
    return TextJob(
        models=named_paths(arguments.model, "--model", default_name=True),
        files=files,
        original=read_original(arguments.original_languages, files, "--data"),
        arguments=arguments,
    )


def read_original(value: str | None, languages: Mapping[str, object], flag: str) -> list[str]:
    """The codes of --original-languages; UserError for one that `flag` doesn't give."""
    original = [language.strip() for language in (value or "").split(",") if language.strip()]
    if unknown := [language for language in original if language not in languages]:
        raise UserError(f"--original-languages names {', '.join(unknown)}, for which there is no {flag}")
    return original


def named_paths(items: list[str], flag: str, default_name: bool = False) -> dict[str, Path]:
    """`NAME=PATH` items as a dict; with `default_name` a bare path is named after its last folder."""
    named: dict[str, Path] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not separator and default_name:
            name, path = Path(item).resolve().name, item
        if not name or not path:
            raise UserError(f"{flag} {item} is no NAME=PATH")
        if name in named:
            raise UserError(
                f"{flag} names {name} twice ({named[name]} and {path}); give each its own name as NAME=PATH"
            )
        named[name] = Path(path)
    return named
