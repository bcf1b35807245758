"""A command that reads the settings of a run as the trainer does, checks them, and writes them to out/settings.yaml."""

import sys
import warnings
from pathlib import Path

from moelpr.process.command import run_command


def main() -> None:
    from moelpr.arguments.parse import check_arguments, register_arguments
    from moelpr.arguments.requirements import resolved_settings
    from moelpr.arguments.settings import RunSettings
    from moelpr.store import yaml_files

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = check_arguments(sys.argv[1:])
        args = register_arguments(run, RunSettings.of(run))
    Path("out/settings.yaml").write_text(yaml_files.dump(resolved_settings(vars(args))))


if __name__ == "__main__":
    run_command(main)
