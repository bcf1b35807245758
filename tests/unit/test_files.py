"""Outputs appear whole or not at all."""

import errno
from pathlib import Path

import pytest

from moelpr.errors import UserError
from moelpr.files import DurableFile, atomic_directory, atomic_file, refuse_existing


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_finished_file_takes_its_name(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "sub" / "a.txt").exists()
    assert (tmp_path / "sub" / "a.txt").read_text() == "new"


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), atomic_directory(target) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_output_is_refused_unless_overwriting(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="exists already.*--overwrite"):
        refuse_existing([tmp_path / "x"], overwrite=False)
    refuse_existing([tmp_path / "x"], overwrite=True)
    refuse_existing([tmp_path / "y"], overwrite=False)


def test_a_disk_that_fails_in_the_background_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells an error of fsync once; swallowed in a thread, the file would count as whole."""
    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moelpr.files.os.fsync", fsync)
    monkeypatch.setattr(DurableFile, "_STRIDE", 4)
    file = DurableFile(tmp_path / "a")
    file.write(b"12345678")
    with pytest.raises(OSError, match="No space left"):
        file.finish()
    file.close()
    other = DurableFile(tmp_path / "b")
    for _ in range(100):
        other.write(b"12345678")
    other.finish()
    assert (tmp_path / "b").read_bytes() == b"12345678" * 100
    assert len(calls) > 2
