"""Versions of the packages that the numbers of a run or an evaluation depend on, and how to install optional ones."""

import platform
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec

from moelpr.base.errors import UserError
from moelpr.base.tools import launch_folder

_PACKAGES = ("moelpr", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "transformer-engine")


def install_command(extra: str) -> str:
    """The command that installs an extra of setup.py: in a repository by name, elsewhere the packages themselves."""
    if not (launch_folder().parent / "setup.py").exists():  # moelpr is on no index
        needed = (one.partition(";")[0].strip() for one in metadata.requires("moelpr") or () if f'"{extra}"' in one)
        return f"{sys.executable} -m pip install {' '.join(map(shlex.quote, needed))}"
    return f"{sys.executable} -m pip install --constraint constraints.txt --no-build-isolation --editable '.[{extra}]'"


def require_package(name: str, extra: str) -> None:
    """Raise a UserError that says how to install an optional package, unless it is there."""
    if find_spec(name) is None:
        raise UserError(f"{name} is not installed; run {install_command(extra)}")


def installed_versions() -> dict[str, str]:
    """Package → version of the installed ones, without importing them; and Python's version."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
