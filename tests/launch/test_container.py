"""Parts of the container that can be tested without one: entry point, constraints, and what the build copies.

launch/container/build_on_stand_in.sh builds the image and runs the tools in it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelpr.__main__ import GROUPS, usage

ROOT = Path(__file__).parents[2]
ENTRYPOINT = ROOT / "launch" / "container" / "entrypoint.sh"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        ([], 0, usage(GROUPS)),
        (["data", "inspect", "--help"], 0, "usage: moelpr data inspect "),
        (["data", "inspect", "--no-such-flag"], 2, "--no-such-flag"),
        (["pretrain", "--help"], 0, "usage: "),
        (["torchrun", "--help"], 0, "usage: "),
        (["first_contact", "--help"], 0, "usage: "),
        (["train", "stage2", "--dry-run", "--lr", "1"], 0, "-m moelpr.pretrain --stage stage2 --lr 1\n"),
        (["echo", "a  b"], 0, "a  b\n"),
        (["stage3"], 2, "stage3"),
    ],
)
def test_the_entry_point_runs_what_its_arguments_name(words: list[str], code: int, printed: str) -> None:
    done = subprocess.run([ENTRYPOINT, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and printed in (done.stderr if code else done.stdout)


def test_a_tool_takes_the_place_of_the_entry_point_whose_signals_it_gets(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")  # the tool waits for it to be written
    with subprocess.Popen([ENTRYPOINT, "report", tmp_path], env=ENVIRONMENT) as tool:
        while "-m\0moelpr\0report" not in Path(f"/proc/{tool.pid}/cmdline").read_text():
            assert tool.poll() is None
            time.sleep(0.05)
        tool.terminate()
    assert tool.returncode in (-15, 128 + 15)


def test_torchs_dependencies_keep_the_images_versions_and_others_get_ours(tmp_path: Path) -> None:
    installed = dict.fromkeys("mpmath-1.3.0 jinja2-3.1.0 tqdm-4.0 optree-0.1".split(), []) | {
        "torch-2.13.0a0+x.nv26.06": ["sympy>=1.13", "Jinja2", 'optree; extra == "optree"', "not-there"],
        "sympy-1.13.1": ["mpmath<1.4"],
    }
    for package, needs in installed.items():
        name, version = package.split("-")
        (tmp_path / f"{package}.dist-info").mkdir()
        metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        (tmp_path / f"{package}.dist-info" / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *metadata, ""]))
    ours = ["Jinja2==3.1.6", "mpmath==9", "optree==1", "sympy==1.14.0", "torch==2.15.0", "tqdm==4.70.1"]
    (tmp_path / "constraints.txt").write_text("\n".join(ours))
    script = ROOT / "launch" / "container" / "constraints_beside.py"
    # -I -S: isolated from this environment; the script sees only packages on its path.
    code = f"import sys, runpy; sys.path.insert(0, '{tmp_path}'); runpy.run_path('{script}', None, '__main__')"
    command = [sys.executable, "-I", "-S", "-c", code, tmp_path / "constraints.txt"]
    written = subprocess.check_output(command, text=True, timeout=20).split()
    kept = ["jinja2==3.1.0", "mpmath==1.3.0", "sympy==1.13.1", "torch==2.13.0a0+x.nv26.06"]
    assert written == [*kept, "optree==1", "tqdm==4.70.1"]


def copied() -> set[str]:
    """The paths of the repository that the build copies."""
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


def test_the_build_copies_what_exists_and_is_not_ignored_and_does_not_run_as_root() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "moelpr" in copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in ignored
    assert re.findall(r"^USER (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1] not in ("0", "root")
