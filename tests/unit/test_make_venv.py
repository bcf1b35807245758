"""launch/make_venv.sh: which Python it uses, and that an incomplete .venv is never used."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.programs import write_program

SCRIPT = Path(__file__).parents[2] / "launch" / "make_venv.sh"
SOURCES = ("setup.py", "requirements/dev.txt", "moelpr/data/csrc/bits.cpp")
TOOLS = "bash cat chmod cp cut df dirname flock grep head mkdir rm sed sha256sum sleep tail timeout touch".split()


def altered_python(change: str) -> str:
    """This Python with a `change` that is applied before the script checks it."""
    return f"""exec '{sys.executable}' -c "import sys, sysconfig; {change}; exec(sys.stdin.read())" "$@" """


FITTING = f"""exec '{sys.executable}' "$@" """
TOO_OLD = altered_python("sys.version_info = (3, 11, 7)")
UNFIT = {
    "shim": ("exit 127", "doesn't run"),
    "old": (TOO_OLD, "is Python 3.11"),
    "no headers": (altered_python("sysconfig.get_path = lambda name: '/nowhere'"), "lacks its C headers"),
    "no ensurepip": (altered_python("sys.modules['ensurepip'] = None"), "lacks venv or ensurepip"),
    "free-threaded": (altered_python("sysconfig.get_config_var = lambda name: 1"), "is not the standard CPython"),
}


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a shell script as `folder/name` below tmp_path, executable."""
    return lambda name, body: write_program(tmp_path / name, body)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with the folders a and b for fake Pythons, and the few tools the script needs; no real Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        actual = shutil.which(tool)
        assert actual, f"{tool} is missing on this machine"
        (tools / tool).symlink_to(actual)
    return {"PATH": f"{tmp_path}/a:{tmp_path}/b:{tools}", "HOME": str(tmp_path)}


def find_python(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, "--find-python"], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unsuitable_python_is_named_or_skipped_for_a_later_one(kind, put, environment):
    unfit = put("a/python3.12", UNFIT[kind][0])
    result = find_python(environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{unfit} {UNFIT[kind][1]}" in result.stderr
    assert result.stderr.count("\n") == 1
    good = put("b/python3.12", FITTING)
    assert find_python(environment).stdout == f"{good}\n"


def test_python3_is_used_if_no_versioned_one_exists_and_PYTHON_overrides_both(put, environment):
    assert find_python(environment).returncode == 2
    for path in ("a/python3", "b/python3.12", "elsewhere/python"):
        good = put(path, FITTING)
        python = {"PYTHON": str(good)} if path.startswith("elsewhere") else {}
        assert find_python(environment | python).stdout == f"{good}\n"
    result = find_python(environment | {"PYTHON": str(put("elsewhere/old", TOO_OLD))})
    assert (result.returncode, result.stdout) == (2, "")


# The following tests run the complete script in a small repository; `python -m venv` and `pip` are stubs.

STUB = f"""
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    [ ! -e pip-fails ] || exit 1
    case "$*" in
    *" config list") cat pip-settings ;;
    *"/dev/fd/"*) [ ! -e uv ] || cp uv .venv/bin/uv ;;
    *) echo "$@" >>pip-calls ;;
    esac
    ;;
*) exec '{sys.executable}' "$@" ;;
esac
"""


@pytest.fixture
def repository(tmp_path: Path, put) -> Path:
    root = tmp_path / "repository"
    (root / "launch").mkdir(parents=True)
    for script in (SCRIPT, SCRIPT.with_name("fill_venv.sh")):
        shutil.copy(script, root / "launch")
    for name in SOURCES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("as first installed\n")
    put("a/python3.13", STUB)
    return root


def make_venv(repository: Path, environment: dict[str, str]) -> int:
    return subprocess.run([repository / "launch/make_venv.sh"], env=environment).returncode


def pip_calls(repository: Path) -> int:
    return len((repository / "pip-calls").read_text().splitlines())


def test_only_changed_files_are_installed_and_into_the_existing_venv(repository, environment):
    assert make_venv(repository, environment) == 0
    installed, itself = (repository / "pip-calls").read_text().splitlines()
    assert installed.endswith(" --require-hashes --requirement requirements/dev.txt")
    assert itself.endswith(" --no-deps --no-build-isolation --editable .")
    (repository / ".venv/kept").touch()
    for changed in (None, *SOURCES):
        calls = pip_calls(repository)
        if changed:
            (repository / changed).write_text("changed\n")
        assert make_venv(repository, environment) == 0
        assert (pip_calls(repository) > calls) == bool(changed)
    assert (repository / ".venv/kept").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_uv_gets_the_settings_of_pip_which_installs_what_uv_cannot(repository, environment, put, code) -> None:
    show = 'echo "$UV_DEFAULT_INDEX|$UV_INDEX|$UV_HTTP_TIMEOUT|$SSL_CERT_FILE|$*" >>uv-calls'
    put("repository/uv", f"{show}; exit {code}")
    settings = ["global.extra-index-url='\\nhttps://b\\nhttps://c'", "global.index-url='https://file'"]
    settings += [":env:.index-url='https://a'", ":env:.default-timeout='60'", "install.cert='/certificates'"]
    (repository / "pip-settings").write_text("\n".join(sorted(settings)))
    assert make_venv(repository, environment | {"SSL_CERT_FILE": "/own"}) == 0
    called = [line.split("|") for line in (repository / "uv-calls").read_text().splitlines()]
    assert [call[:4] for call in called] == 2 * [["https://a", "https://b https://c", "60", "/own"]]
    words = [call[4].split() for call in called]
    assert all(call[:4] == ["pip", "install", "--python", ".venv/bin/python"] for call in words)
    assert words[0][4:] == "--require-hashes --requirement requirements/dev.txt".split()
    assert (repository / "pip-calls").exists() == bool(code)


def test_a_disk_that_is_too_small_is_named_before_anything_is_installed(repository, environment, put):
    df = put("a/df", """[ "$2" = 1000000000 ] && printf "Avail\\n5\\n" """)
    result = subprocess.run([repository / "launch/make_venv.sh"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and f"{repository} has 5 GB free" in result.stderr
    assert not (repository / "pip-calls").exists()
    df.unlink()
    assert make_venv(repository, environment) == 0


@pytest.mark.parametrize("change", ["failed install", "broken", "another PYTHON"])
def test_a_venv_that_is_incomplete_or_for_another_python_is_created_again(repository, environment, put, change):
    if change == "failed install":
        (repository / "pip-fails").touch()
    assert make_venv(repository, environment) == (change == "failed install")
    (repository / ".venv/stale").touch()
    (repository / "pip-fails").unlink(missing_ok=True)
    if change == "broken":
        (repository / ".venv/bin/python").write_text("#!/bin/sh\nexit 127\n")
    elif change == "another PYTHON":
        other = put("elsewhere/other", f"""[ "$1" != -c ] || {{ echo another Python; exit; }}\n{STUB}""")
        environment |= {"PYTHON": str(other)}
    assert make_venv(repository, environment) == 0
    assert not (repository / ".venv/stale").exists() and pip_calls(repository) > 0


def test_a_moved_repository_is_installed_again(repository, environment):
    make_venv(repository, environment)
    calls = pip_calls(repository)
    moved = repository.rename(repository.with_name("moved"))
    assert make_venv(moved, environment) == 0
    assert pip_calls(moved) > calls


def test_an_unsuitable_PYTHON_does_not_touch_the_venv(repository, environment, put):
    make_venv(repository, environment)
    old = put("elsewhere/old", f"""[ "$1" != -c ] || {{ echo 3.11; exit; }}\n{TOO_OLD}""")
    assert make_venv(repository, environment | {"PYTHON": str(old)}) == 2
    assert make_venv(repository, environment) == 0
    assert (repository / ".venv/bin/python").exists()
