"""A command that reads the settings of a run as the trainer does, checks them, and writes them to out/settings.yaml."""

import sys
import warnings
from pathlib import Path

from moelpr.process.command import run_command


def main() -> None:
    from moelpr.arguments.parse import parse_arguments
    from moelpr.arguments.settings import resolved_settings
    from moelpr.store import yaml_files

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, _ = parse_arguments(sys.argv[1:])
    Path("out/settings.yaml").write_text(yaml_files.dump(resolved_settings(args)))


if __name__ == "__main__":
    run_command(main)
