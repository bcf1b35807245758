"""Outputs appear whole or not at all: write to a temporary name, fsync, rename."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import filelock

from moelpr.errors import UserError

# In a partial folder: what it is to become.
JOB_FILE = ".job"
LOCK_FILE = ".lock"


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Stop when an output exists already and `--overwrite` was not given."""
    found = [str(path) for path in paths if path.exists()]
    if found and not overwrite:
        raise UserError(f"the output {', '.join(found)} exists already; choose another name or pass --overwrite")


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no reader takes for the real thing."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name; on success it is fsynced and renamed to `path`, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it takes the place of `path` (replacing it), on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resumable_directory(path: Path, job: str) -> Iterator[Path]:
    """Like `atomic_directory`, but what an interrupted run of the same job has written is still there.

    The folder `.<name>.partial` beside `path` stays behind unless the job ends or fails with a UserError; only a job of
    the same description goes on with it. UserError where another process is writing to it.

    Args:
        job: everything that the output depends on, as text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(exist_ok=True)
    with locked(partial / LOCK_FILE, path):
        description = partial / JOB_FILE
        if not description.is_file() or description.read_text() != job:
            empty(partial)
            with atomic_file(description) as temporary:
                temporary.write_text(job)
        try:
            yield partial
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        description.unlink()
        (partial / LOCK_FILE).unlink(missing_ok=True)
        _take_place(partial, path)


@contextmanager
def locked(lock_file: Path, output: Path | str) -> Iterator[None]:
    """Hold the lock in `lock_file`; on a file system without locks, hold nothing.

    Raises:
        UserError: another process holds it, so it is writing `output`.
    """
    lock = filelock.FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another process is writing {output}; wait for it, or choose another name") from None
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        lock.release()


def empty(folder: Path) -> None:
    """Remove what is in `folder`, except its lock."""
    for path in folder.iterdir():
        if path.name == LOCK_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _take_place(temporary: Path, path: Path) -> None:
    """The folder `temporary`, made durable, becomes `path`."""
    for file in temporary.rglob("*"):
        if file.is_file():
            fsync_file(file)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


class DurableFile:
    """A new file that goes to disk while it is being written, so that making it durable costs little at its end."""

    _STRIDE = 128 << 20  # bytes between two requests

    def __init__(self, path: Path):
        self.name = path.name
        self._file = open(path, "wb")
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._under_way: Future[None] | None = None
        self._synced = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; also what torch.save writes to."""
        self._file.write(data)
        if self.tell() - self._synced >= self._STRIDE and (self._under_way is None or self._under_way.done()):
            self._raise_what_failed()
            self._file.flush()
            self._synced = self.tell()
            self._under_way = self._disk.submit(os.fsync, self._file.fileno())
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def finish(self) -> None:
        """Close the file when it is on disk."""
        self._raise_what_failed()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def _raise_what_failed(self) -> None:
        """A failed write to disk is told once, to the thread that asked."""
        if self._under_way is not None:
            self._under_way.result()

    def close(self) -> None:
        self._disk.shutdown()
        self._file.close()


def fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
