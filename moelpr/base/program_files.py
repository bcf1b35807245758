"""Where the files are that come with the program and are not modules: launchers, recipes, job scripts."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def launch_folder() -> Path:
    """The folder of launchers, recipes and Slurm's scripts: of an installed package its own, else the repository's."""
    installed = _PACKAGE / "launch"
    return installed if installed.is_dir() else _PACKAGE.parent / "launch"
