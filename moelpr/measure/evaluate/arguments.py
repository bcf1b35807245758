"""Arguments that `moelpr evaluate` and `moelpr compare` share."""

import argparse
from collections.abc import Callable
from pathlib import Path

from moelpr.base.checksums import NO_VERIFY
from moelpr.base.command import CommandParser, check_is_utf8
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical


def reading_arguments(documents: str) -> CommandParser:
    """The arguments of how text is read; `documents` says how many there are by default."""
    parser = CommandParser(add_help=False)
    add = parser.add_argument
    add("--json-key", default="text", metavar="KEY", help="key of the text (default: %(default)s)")
    add("--max-documents", type=at_least(1), metavar="N", help=f"documents per text (default: {documents})")
    what = "window in tokens (default: 512, or the models' maximum if that is less)"
    add("--sequence-length", type=at_least(1), metavar="N", help=what)
    what = "overlap of consecutive windows of a document, in tokens (default: a quarter of the window)"
    add("--context", type=int, metavar="N", help=what)
    add("--batch-size", type=at_least(1), metavar="N", help="full windows per batch (default: what fits in memory)")
    what = (
        "tokens at the start of each document that are context and do not count, such as 32 for a base tuned for chat, "
    )
    what += "which predicts the start of a plain text badly (default: %(default)s)"
    add("--skip-tokens", type=at_least(0), default=0, metavar="N", help=what)
    add("--json", action="store_true", help="print one line of JSON instead of tables")
    return parser


def device_arguments() -> CommandParser:
    """The arguments of how models are loaded."""
    parser = CommandParser(add_help=False)
    add = parser.add_argument
    what = "cpu, cuda, cuda:N or auto: a GPU if any, and as many as the model needs (default: auto)"
    add("--device", default="auto", help=what)
    what = "auto: float32 on a CPU, the model's own on a GPU (default: %(default)s)"
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help=what)
    add("--no-verify", **NO_VERIFY)
    return parser


def computing_arguments() -> CommandParser:
    """The arguments of all commands that measure models."""
    parser = CommandParser(add_help=False, parents=[device_arguments()])
    what = "folder for results as JSON, Markdown and HTML, and for figures; rerun the command to resume"
    parser.add_argument("--output", type=Path, metavar="DIR", help=what)
    return parser


def named_paths(items: list[str], flag: str) -> dict[str, str]:
    """NAME=DIR or LANG=FILE arguments by name; the name of a bare --model path is that of its last folder."""
    form, example = ("NAME=DIR", "base") if flag == "--model" else ("LANG=FILE", "en")
    named: dict[str, str] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not separator and flag == "--model":
            name, path = Path(item).resolve().name, item
        check_is_utf8(item, f"{flag} argument")
        if not name or not path:
            raise UserError(f"{flag} must be {form}, such as {example}={item.strip('=')}, got {item}")
        name = name if flag == "--model" else canonical(name)
        if name in named:
            raise UserError(f"{flag} has {name} twice ({named[name]} and {path}); give each its own name as {form}")
        named[name] = path
    return named


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not value.isdecimal() or int(value) < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {value}")
        return int(value)

    return parse
