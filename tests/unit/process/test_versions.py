import platform
from importlib import metadata

import pytest

from moelpr.process.versions import installed_versions


def test_versions_are_those_of_the_installed_packages() -> None:
    versions = installed_versions()
    assert versions["python"] == platform.python_version()
    assert versions["megatron-core"] == metadata.version("megatron-core")


def test_packages_that_are_not_installed_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    assert set(installed_versions()) == {"python"}
