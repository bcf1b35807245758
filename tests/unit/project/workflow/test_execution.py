"""Commands that are started import nothing from the current folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from moelpr.project.workflow.execution import execute

NAMES = ("yaml", "tokenize", "random", "torch", "psutil", "moelpr")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with modules that would write the file that is returned."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path / "ran"


def test_a_step_imports_no_file_of_the_project(ran: Path) -> None:
    log = ran.with_name("log")
    assert execute(["moelpr", "train", "stage1", "--help"], log, {}, stderr=subprocess.STDOUT) == 0
    assert "--pretrained-checkpoint" in log.read_text()  # from a process that it starts
    assert not ran.exists()


def test_ranks_import_no_file_of_the_current_folder_and_leave_none(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary := ran.with_name("temporary")).mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    launcher = [sys.executable, "-P", "-m", "moelpr.torchrun", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run([*launcher, "-m", "moelpr.pretrain", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--pretrained-checkpoint" in done.stdout and not ran.exists()
    assert not [*temporary.glob("*torchelastic*")]
