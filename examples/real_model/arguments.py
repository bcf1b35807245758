"""The flags of the scripts that download."""

from pathlib import Path

from moelpr.process.command import CommandParser


def parse_folders(description: str) -> tuple[Path, Path, bool]:
    """The values of a script's flags: the output folder, --run, that of downloads, --cache, and --overwrite."""
    parser = CommandParser(description=description)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/real-model"), metavar="DIR", help="output folder (default: %(default)s)")
    add("--cache", type=Path, metavar="DIR", help="folder of downloads (default: RUN/downloads)")
    add("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args()
    return args.run, args.cache or args.run / "downloads", args.overwrite
