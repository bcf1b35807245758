"""Versions of the packages that the numbers of a run or an evaluation depend on, and how to install optional ones."""

import platform
import sys
from importlib import metadata

from moelpr.base.program_files import launch_folder

_PACKAGES = ("moelpr", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "transformer-engine")


def install_command(extra: str) -> str:
    """The command that installs an extra of setup.py, in a repository next to the pinned versions."""
    if not (launch_folder().parent / "setup.py").exists():
        return f"{sys.executable} -m pip install 'moelpr[{extra}]'"
    return f"{sys.executable} -m pip install --constraint constraints.txt --no-build-isolation --editable '.[{extra}]'"


def installed_versions() -> dict[str, str]:
    """Package → version of the installed ones, without importing them; and Python's version."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
