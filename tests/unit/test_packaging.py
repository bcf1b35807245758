"""The files that define an installation match each other and what is installed."""

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import moelpr

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """constraints.txt as name -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "constraints.txt must contain only name==version"
    )
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def installed_closure(name: str, extras: frozenset[str]) -> Iterator[str]:
    """The direct and indirect dependencies of `name[extras]` on this machine."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, extras)]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for text in metadata.requires(current[0]) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in current[1] | {""}):
                needed = canonicalize_name(requirement.name)
                yield needed
                waiting.append((needed, frozenset(requirement.extras)))


def test_constraints_pin_every_installed_package_to_its_version(pins):
    needed = {"setuptools", "pybind11", *installed_closure("moelpr", frozenset({"dev"}))}
    assert {name: pins.get(name) for name in needed} == {name: metadata.version(name) for name in needed}


def test_constraints_contain_only_required_packages(pins):
    needed = {"setuptools", "pybind11", *installed_closure("moelpr", frozenset({"dev"}))}
    assert set(pins) - needed == set()


def test_the_installed_version_is_the_packages_own():
    assert metadata.version("moelpr") == moelpr.__version__


def test_make_venv_supports_the_pythons_of_setup_py():
    promised = SpecifierSet(metadata.metadata("moelpr")["Requires-Python"])
    script = (ROOT / "launch/make_venv.sh").read_text()
    supported = re.search(r"^supported=\((.*?)\)", script, re.MULTILINE)
    assert supported
    assert set(supported[1].split()) == {f"3.{minor}" for minor in range(30) if f"3.{minor}" in promised}
