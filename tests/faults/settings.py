"""A command that reads the settings of a run as the trainer does, checks them, and writes them to out/settings.yaml."""

import sys
import warnings
from pathlib import Path

from moelpr.base.command import run_command


def main() -> None:
    from moelpr.base import yaml_files
    from moelpr.train.arguments.parse import check_arguments, register_arguments
    from moelpr.train.arguments.requirements import resolved_settings
    from moelpr.train.arguments.settings import RunSettings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = check_arguments(sys.argv[1:])
        args = register_arguments(run, RunSettings.of(run))
    Path("out/settings.yaml").write_text(yaml_files.dump(resolved_settings(vars(args))))


if __name__ == "__main__":
    run_command(main)
