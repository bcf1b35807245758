"""Parts of the container that can be tested without one: entry point, constraints, and what the build copies.

launch/container/build_on_stand_in.sh builds the image and runs the tools in it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moelpr.__main__ import GROUPS, usage
from tests.support.run_folders import make_run

ROOT = Path(__file__).parents[2]


def entrypoint(*arguments: str) -> subprocess.CompletedProcess:
    command = [ROOT / "launch" / "container" / "entrypoint.sh", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_help_lists_every_tool_with_its_purpose() -> None:
    help_text = entrypoint().stdout
    assert help_text.startswith(usage(GROUPS)) and "first_contact" in help_text


def test_a_tool_gets_its_arguments() -> None:
    assert entrypoint("data", "inspect", "--help").stdout.startswith("usage: moelpr data inspect ")
    assert entrypoint("data", "inspect", "--no-such-flag").returncode == 2


@pytest.mark.parametrize("name", ["pretrain", "torchrun", "first_contact"])
def test_what_is_no_subcommand_of_moelpr_has_its_name_too(name: str) -> None:
    assert entrypoint(name, "--help").stdout.startswith("usage: ")


def test_a_stage_runs_its_launcher() -> None:
    line = entrypoint("train", "stage2", "--dry-run", "--lr", "1").stdout
    assert line.endswith("-m moelpr.pretrain --stage stage2 --lr 1\n")


def test_any_other_command_runs_unchanged() -> None:
    assert entrypoint("echo", "a b").stdout == "a b\n"


def test_a_tool_takes_the_place_of_the_entry_point_whose_signals_it_gets(tmp_path: Path) -> None:
    command = [ROOT / "launch" / "container" / "entrypoint.sh", "report", "live"]
    run = make_run(tmp_path / "run", "stage1", steps=3, is_finished=False)
    with subprocess.Popen([*command, run], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as tool:
        assert tool.stdout is not None and tool.stdout.readline()
        assert "-m\0moelpr\0report\0live" in Path(f"/proc/{tool.pid}/cmdline").read_text()
        tool.terminate()
    assert tool.returncode in (0, 128 + 15)


def test_an_unknown_name_exits_with_code_2() -> None:
    done = entrypoint("stage3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "stage3" in done.stderr and "--help" in done.stderr


def test_torchs_dependencies_keep_the_images_versions_and_others_get_ours(tmp_path: Path) -> None:
    installed = {
        "torch": ("2.13.0a0+x.nv26.06", ["sympy>=1.13", "Jinja2", 'optree; extra == "optree"', "not-there"]),
        "sympy": ("1.13.1", ["mpmath<1.4"]),
        "mpmath": ("1.3.0", []),
        "jinja2": ("3.1.0", []),
        "transformer_engine": ("2.19.0", ["pydantic"]),
        "pydantic": ("2.0", []),
        "tqdm": ("4.0", []),
        "optree": ("0.1", []),
    }
    for name, (version, needs) in installed.items():
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        metadata = "".join([f"Name: {name}\nVersion: {version}\n", *(f"Requires-Dist: {need}\n" for need in needs)])
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}")
    ours = ["Jinja2==3.1.6", "mpmath==9", "optree==1", "pydantic==9", "sympy==1.14.0", "torch==2.15.0", "tqdm==4.70.1"]
    (tmp_path / "constraints.txt").write_text("\n".join(ours) + "\n")
    script = ROOT / "launch" / "container" / "constraints_beside.py"
    # -I -S: isolated from this environment; the script sees only packages on its path.
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(script)!r}, None, '__main__')"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path / "constraints.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    written = done.stdout.splitlines()
    assert written == [
        *("jinja2==3.1.0", "mpmath==1.3.0", "pydantic==2.0", "sympy==1.13.1", "torch==2.13.0a0+x.nv26.06"),
        *("transformer-engine==2.19.0", "optree==1", "tqdm==4.70.1"),
    ]


def copied() -> set[str]:
    """What the build copies of the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return {source for line in lines for source in line.split()}


def test_what_first_contact_imports_of_the_repository_is_copied() -> None:
    files = [file for source in copied() for file in [ROOT / source, *(ROOT / source).rglob("*.py")]]
    imports = re.compile(r"^ *from ((?:benchmarks|examples|tests)[\w.]*) import (\w+)", re.MULTILINE)
    lines = {line for file in files if file.suffix == ".py" for line in imports.findall(file.read_text())}
    names = {name.replace(".", "/") + ".py" for module, member in lines for name in (module, f"{module}.{member}")}
    needed = {Path(name) for name in names if (ROOT / name).exists()}
    assert needed
    assert not [path for path in needed if not {str(path), *map(str, path.parents)} & copied()]


def test_everything_the_build_copies_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "moelpr" in copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in ignored


def test_the_image_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users and users[-1] not in ("0", "root")
