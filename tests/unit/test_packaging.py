"""The files that define an installation match each other and what is installed.

Every package that setup.py names is used: imported by us, by Megatron without declaring it, or run as a tool.
"""

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import moelpr

ROOT = Path(__file__).parents[2]
OUR_CODE = ("moelpr", "data_tools", "checkpoint_convert", "examples", "benchmarks", "tests", "setup.py")
# Where a tool that nobody imports is run or configured.
TOOL_FILES = ("Makefile", "pyproject.toml", ".pre-commit-config.yaml", "README.md", "CONTRIBUTING.md")
# Installed for Megatron, which imports them without declaring them.
FOR_MEGATRON = ("einops",)
# Transformer Engine loads its libraries without declaring them.
FOR_TRANSFORMER_ENGINE = ("cuda-toolkit",)
# Packages whose module has another name, and which need not be installed or, as stubs, are only read by mypy.
MODULES = {"mlflow-skinny": "mlflow", "types-pyyaml": "yaml"}
# Commands, or settings in pyproject.toml, that have another name.
COMMANDS = {"import-linter": ["lint-imports"], "pytest-timeout": ["timeout"]}
# fsspec loads them by a URI's scheme.
FOR_FSSPEC = ("aiohttp", "gcsfs", "s3fs")


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """constraints.txt as name -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "not only name==version"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def installed_closure(name: str, extras: frozenset[str]) -> Iterator[str]:
    """The direct and indirect dependencies of `name[extras]` on this machine."""
    reached = [(name, extras)]
    for name, extras in reached:  # the list grows meanwhile
        for requirement in map(Requirement, metadata.requires(name) or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                needed = canonicalize_name(requirement.name), frozenset(requirement.extras)
                yield needed[0]
                reached += [needed] if needed not in reached else []


def test_constraints_pin_the_installed_packages_to_their_versions_and_no_others(pins):
    needed = {"setuptools", *installed_closure("moelpr", frozenset({"dev"}))}
    assert pins == {name: metadata.version(name) for name in needed}


def test_pins_with_hashes_are_those_without_and_name_no_host(pins):
    """Groups of pyproject.toml repeat none of them."""
    names = {"dev", *tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]}
    assert {f"{name}.txt" for name in names} == {path.name for path in (ROOT / "requirements").iterdir()}
    for name in names:
        text = (ROOT / f"requirements/{name}.txt").read_text()
        packages = re.findall(r"^(\S+)==(\S+) .*((?:\\\n    --hash=sha256:[0-9a-f]{64} ?)+)$", text, re.MULTILINE)
        assert len(packages) == text.count("==") - text.count(" == ")
        assert not re.search("://|^-", text, re.MULTILINE)
        actual = {package: version for package, version, _ in packages}
        assert actual == pins if name == "dev" else not actual.keys() & pins.keys()


def test_the_installed_version_is_the_packages_own():
    assert metadata.version("moelpr") == moelpr.__version__


def test_make_venv_supports_the_pythons_of_setup_py():
    promised = SpecifierSet(metadata.metadata("moelpr")["Requires-Python"])
    (supported,) = re.findall(r"^supported=\((.*?)\)", (ROOT / "launch/make_venv.sh").read_text(), re.MULTILINE)
    assert set(supported.split()) == {f"3.{minor}" for minor in range(30) if f"3.{minor}" in promised}


def imported_modules(*paths: Path) -> set[str]:
    """Top-level names that the Python files below `paths` import, also inside functions."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {node.module.partition(".")[0], node.module}
    return names


@pytest.fixture(scope="module")
def ours() -> set[str]:
    return imported_modules(*(ROOT / name for name in OUR_CODE))


@pytest.fixture(scope="module")
def modules_of() -> dict[str, set[str]]:
    """Distribution -> top-level modules, of what is installed."""
    modules = defaultdict[str, set[str]](set)
    for module, distributions in metadata.packages_distributions().items():
        for distribution in distributions:
            modules[canonicalize_name(distribution)].add(module)
    return modules


def dependencies(*, extras: bool) -> list[str]:
    requirements = [Requirement(text) for text in metadata.requires("moelpr") or []]
    return sorted({canonicalize_name(one.name) for one in requirements if ("extra" in str(one.marker)) is extras})


@pytest.mark.parametrize("name", [name for name in dependencies(extras=False) if name not in FOR_MEGATRON])
def test_our_code_imports_every_package_that_is_always_installed(name: str, ours, modules_of) -> None:
    assert modules_of[name] & ours


@pytest.mark.parametrize("name", FOR_MEGATRON)
def test_megatron_imports_what_is_installed_for_it(name: str, modules_of) -> None:
    spec = util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    assert name in dependencies(extras=False)
    required = [Requirement(text) for text in metadata.requires("megatron-core") or []]
    declared = {canonicalize_name(one.name) for one in required if "extra" not in str(one.marker)}
    assert name not in declared, "Megatron declares it now: remove it from setup.py"
    assert modules_of[name] & imported_modules(Path(spec.origin).parent)


@pytest.mark.parametrize(
    "name", [x for x in dependencies(extras=True) if x not in (*FOR_TRANSFORMER_ENGINE, *FOR_FSSPEC)]
)
def test_every_extra_is_imported_or_run(name: str, ours, modules_of) -> None:
    modules = modules_of.get(name, {name.replace("-", "_")}) | {MODULES.get(name, name)}  # extras need not be installed
    tools = "\n".join((ROOT / file).read_text() for file in TOOL_FILES)
    commands = {name, *modules, name.removesuffix("-bin").removesuffix("-py"), *COMMANDS.get(name, [])}
    assert modules & ours or any(re.search(rf"(?<![\w.-]){re.escape(command)}\b", tools) for command in commands)
