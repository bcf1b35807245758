from importlib import metadata

import pytest

from moelpr.base.versions import installed_versions


def test_packages_that_are_not_installed_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    assert set(installed_versions()) == {"python"}
