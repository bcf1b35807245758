"""Outputs appear complete or not at all."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from moelpr.base.errors import UserError
from moelpr.base.files import (
    LOCK_FILE,
    atomic_directory,
    atomic_file,
    copy_part,
    locked,
    temporary_folder,
    temporary_name,
    write_text,
)
from moelpr.base.journal import resumable_directory


@contextmanager
def partial(path: Path) -> Iterator[Path]:
    with resumable_directory(path, "job") as journal:
        yield journal.folder


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_a_failed_write_leaves_the_old_output_and_nothing_else(write, tmp_path: Path) -> None:
    for content in ("old", "half"):
        with suppress(ZeroDivisionError), write(tmp_path / "a") as temporary:
            (temporary / "file" if temporary.is_dir() else temporary).write_text(content)
            assert content == "old" or 1 / 0
    (actual,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert actual.read_text() == "old" and [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize("write", [atomic_directory, partial])
def test_a_link_to_a_folder_stays_a_link(write, tmp_path: Path) -> None:
    (run := tmp_path / "disk" / "run").mkdir(parents=True)
    (run / "old").touch()
    (tmp_path / "run").symlink_to(run)
    with write(tmp_path / "run") as temporary:
        assert temporary.parent == tmp_path / "disk"
        (temporary / "new").touch()
    assert (tmp_path / "run").is_symlink()
    assert [*run.iterdir(), *run.parent.iterdir()] == [run / "new", run]


@pytest.mark.parametrize("write", [atomic_file, atomic_directory, partial])
def test_an_output_folder_that_cannot_be_written_is_reported(write, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "b", tmp_path / ("a" * 300), Path("/proc/b")):
        with pytest.raises(UserError, match=f"can't write to the folder {folder} "), write(folder / "a"):
            pass
    monkeypatch.setattr("os.access", lambda *_: False)  # read-only for anyone but root
    with pytest.raises(UserError, match=f"can't .*; ask .*, who owns {tmp_path}, .* your group"), write(tmp_path / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_the_place_of_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/out is a folder"):
        write_text(tmp_path / "out", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_on_the_file_system_nothing_is_held_and_nothing_remains(tmp_path, monkeypatch, number) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    with locked(tmp_path / LOCK_FILE, "x"), locked(tmp_path / LOCK_FILE, "x"):
        pass
    monkeypatch.undo()
    with locked(tmp_path / LOCK_FILE, "x"):
        pass


def test_a_killed_process_leaves_no_lock_even_if_a_process_it_has_forked_lives_on(tmp_path: Path) -> None:
    code = """if True:
        import os, sys, time
        from moelpr.base.files import locked
        with locked(sys.argv[1], "x"):
            if os.fork() == 0:
                print(os.getpid(), flush=True)  # it runs, so it has closed what it inherited
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / LOCK_FILE], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    forked = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match="another process is writing x"), locked(tmp_path / LOCK_FILE, "x"):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path / LOCK_FILE, "x"):
            pass
    finally:
        holder.kill()
        os.kill(forked, signal.SIGKILL)


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_what_a_killed_process_has_left_is_removed_by_the_next_one(write, tmp_path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = temporary_name(Path("a")).name.removesuffix(str(os.getpid()))  # ".a.tmp-MACHINE-"
    others = [f"{here}{os.getppid()}", ".a.tmp-x", f".b{here[2:]}{ended.pid}", f".a.tmp-elsewhere-{ended.pid}"]
    others = [tmp_path / name for name in others]
    for path in (tmp_path / f"{here}{ended.pid}", *others):
        path.touch()
    with write(tmp_path / "a") as temporary:
        (temporary / "file" if temporary.is_dir() else temporary).touch()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", *others])


def test_a_folder_of_a_killed_process_among_temporary_files_is_removed_by_the_next_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines = "import os", "from moelpr.base.files import *", "with temporary_folder('a'):", "    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", "\n".join(lines)], env=os.environ | {"TMPDIR": str(tmp_path)})
    (left,) = tmp_path.iterdir()
    with temporary_folder("a") as folder:
        assert [*tmp_path.iterdir()] == [folder] != [left]
    assert not [*tmp_path.iterdir()]


def test_a_lock_that_another_user_has_left_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=denied))  # root may open every file
    message = r"\.lock belongs to another user.*remove .*unfinished"
    with pytest.raises(UserError, match=message), locked(tmp_path / ".el.unfinished" / ".lock", "el"):
        pass


def test_a_copied_folder_has_nothing_from_outside_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"LICENSE is a link to .*secret"):
        copy_part(tmp_path / "hf", "", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
