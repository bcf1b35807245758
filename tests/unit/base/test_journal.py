"""An interrupted job goes on where its journal ends, and only the same job does."""

import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from moelpr.base.errors import UserError
from moelpr.base.files import LOCK_FILE
from moelpr.base.journal import JOURNAL_FILE, Journal, resumable_directory


class Killed(BaseException):
    """An interruption."""


class Part(NamedTuple):
    name: str
    size: int


def test_entries_are_there_again_without_one_that_was_cut_off(tmp_path: Path) -> None:
    parts = [Part("a", 1), Part("b\n", 2)]
    journal = Journal(tmp_path, {"copy": Path("x")})
    for part in parts:
        journal.add(part)
    assert journal.entries(Part) == []
    with open(tmp_path / JOURNAL_FILE, "a") as file:
        file.write('["c"')
    assert Journal.job_in(tmp_path) == {"copy": "x"}
    journal = Journal(tmp_path, {"copy": Path("x")})
    assert journal.entries(Part) == parts
    journal.add(Part("c", 3))
    assert Journal(tmp_path, {"copy": Path("x")}).entries(Part) == [*parts, Part("c", 3)]


@pytest.mark.parametrize("left", ['{"job":"b"}\n["a",1]\n', '{"job":"a"', ""])
def test_without_a_journal_of_the_same_job_the_folder_is_emptied(tmp_path: Path, left: str) -> None:
    (tmp_path / JOURNAL_FILE).write_text(left)
    for name in ("part", LOCK_FILE):
        (tmp_path / name).touch()
    assert Journal(tmp_path, "a").entries(Part) == []
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, JOURNAL_FILE}
    assert Journal.job_in(tmp_path) == "a"


@pytest.mark.parametrize("line", ['["a"]\n', "\0\0\n"])
def test_a_damaged_entry_is_a_user_error(tmp_path: Path, line: str) -> None:
    Journal(tmp_path, "a")
    with open(tmp_path / JOURNAL_FILE, "a") as file:
        file.write(line)
    with pytest.raises(UserError, match=rf"{JOURNAL_FILE}: .*; remove the folder {tmp_path}"):
        Journal(tmp_path, "a").entries(Part)


def test_the_old_folder_is_whole_until_the_new_one_is_in_its_place(tmp_path, monkeypatch) -> None:
    """Killed while the old folder is removed: what has the name is the new one, and the next job removes the rest."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    remove, replace = shutil.rmtree, os.replace

    def killed(path: Path, **options: object) -> None:
        if (path / "old").exists():
            raise Killed
        remove(path, **options)

    def fails(source: Path, to: Path) -> None:
        if source.name == ".out.partial":
            raise OSError(errno.EIO, "disk")
        replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="disk"), resumable_directory(target, "job") as journal:
            (journal.folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed), resumable_directory(target, "job") as journal:
            (journal.folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    monkeypatch.setattr("psutil.pid_exists", lambda number: False)
    monkeypatch.setattr("os.getpid", lambda: 1234567)  # another process
    with resumable_directory(target, "job") as journal:
        (journal.folder / "newer").touch()
    assert [path.name for path in target.iterdir()] == ["newer"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("job", "kept"), [("copy a", True), ("copy b", False)])
def test_an_interrupted_job_is_resumed_by_the_same_job_only(tmp_path: Path, job: str, kept: bool) -> None:
    target = tmp_path / "out"
    with pytest.raises(Killed), resumable_directory(target, "copy a") as journal:
        (journal.folder / "part").touch()
        (journal.folder / ".part.tmp-1").touch()
        raise Killed
    assert not target.exists()
    with resumable_directory(target, job) as journal:
        assert (journal.folder / "part").exists() is kept
        (journal.folder / "rest").touch()
    assert {path.name for path in target.iterdir()} == ({"part", "rest"} if kept else {"rest"})
    assert list(tmp_path.iterdir()) == [target]


def test_a_job_that_fails_with_a_user_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), resumable_directory(tmp_path / "out", "job") as journal:
        (journal.folder / "part").touch()
        raise UserError("wrong input")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_another_process_or_a_file_has_is_a_user_error(tmp_path: Path) -> None:
    out, other = tmp_path / "out", f"another process is writing {tmp_path}/out"
    with resumable_directory(out, "job") as journal:
        (journal.folder / "part").touch()
        with pytest.raises(UserError, match=other), resumable_directory(out, "another job"):
            pass
        assert (journal.folder / "part").exists()
    (tmp_path / ".out.partial").touch()
    with pytest.raises(UserError, match="partial is a file"), resumable_directory(out, "job"):
        pass
