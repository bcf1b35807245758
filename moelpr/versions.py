"""Versions of what a run's or an evaluation's numbers depend on."""

import platform
from importlib import metadata

_PACKAGES = ("moelpr", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "transformer-engine")


def installed_versions() -> dict[str, str]:
    """Package → version, of those that are installed; without importing them."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
