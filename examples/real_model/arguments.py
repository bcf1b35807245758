"""The flags of the queue's scripts."""

from argparse import Namespace
from pathlib import Path

from moelpr.base.command import CommandParser


def parse(description: str, *, downloads: bool = False, overwrite: bool = True) -> Namespace:
    """The values of --run, of --cache if the script downloads, and of --overwrite if it writes a new output."""
    return parser_of(description, downloads=downloads, overwrite=overwrite).parse_args()


def parser_of(description: str, *, downloads: bool = False, overwrite: bool = True) -> CommandParser:
    """The parser of these flags, for a script that has more."""
    parser = CommandParser(description=description)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/real-model"), metavar="DIR", help="the folder (default: %(default)s)")
    if downloads:
        add("--cache", type=Path, metavar="DIR", help="folder of downloads (default: RUN/downloads)")
    if overwrite:
        add("--overwrite", action="store_true", help="replace an existing output")
    return parser
