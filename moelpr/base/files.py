"""Outputs appear complete or not at all: files and folders are written under a temporary name, fsynced and renamed.

A lock keeps a second process from writing the same output. A copy of what comes from elsewhere follows no links that
lead out of its folder.
"""

import errno
import glob
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import psutil

from moelpr.base.errors import DISK_FULL, UserError

LOCK_FILE = ".lock"


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raise a UserError if an output exists already and `overwrite` is False."""
    existing = [str(path) for path in paths if os.path.exists(path)]  # False if a name is too long
    if existing and not overwrite:
        raise UserError(f"the output {', '.join(existing)} already exists; choose another name or pass --overwrite")


def make_folder(folder: Path) -> None:
    """Create a folder to write to, and its parents.

    Raises:
        UserError: It can't be created, or is read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        hint = ""
        if isinstance(error, PermissionError):
            place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
            with suppress(KeyError):  # a user without a name
                hint = f"ask {place.owner()}, who owns {place}, to let your group write there, or "
        raise UserError(f"can't write to the folder {folder} ({error.strerror}); {hint}choose another") from error


# Processes of other machines, whose numbers mean nothing here, may write into the same folder.
_MACHINE = f"{zlib.crc32(os.uname().nodename.encode()):08x}"


def temporary_name(path: Path) -> Path:
    """A name in the same folder that no reader mistakes for the finished output."""
    return path.with_name(f".{path.name}.tmp-{_MACHINE}-{os.getpid()}")


class LockedError(UserError):
    """Another process holds a lock."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name; on success it is fsynced and renamed to `path`, on failure removed."""
    make_folder(path.parent)
    temporary = temporary_name(path)
    remove_leftovers(path)
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, but a file is to be written there; remove it") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine have left of `path` under its temporary names."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-{_MACHINE}-*"):
        number = left.name.removesuffix("-old").rpartition("-")[2]
        if number.isdecimal() and len(number) < 10 and not psutil.pid_exists(int(number)):
            with suppress(PermissionError):  # another user's
                remove(left)


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yield a folder in the system's temporary one, which is removed, as are those that killed processes have left."""
    remove_leftovers(Path(tempfile.gettempdir(), name))
    with tempfile.TemporaryDirectory(prefix=f".{name}.tmp-{_MACHINE}-", suffix=f"-{os.getpid()}") as folder:
        yield Path(folder)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; another process may be doing the same."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left of atomic files; call it if no other process can be writing them."""
    for path in folder.glob("**/.*.tmp-*"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file with `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it replaces `path`, on failure it is removed."""
    path = behind_link(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    remove_leftovers(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked_folder(folder: Path, output: Path | str) -> Iterator[None]:
    """Hold the lock of a folder for unfinished files, which is created if necessary.

    Raises:
        UserError: Another process is writing `output` there, or has just written it.
    """
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        if os.path.lexists(folder):
            raise UserError(f"{folder} is a file, but a folder is to be written there; remove it") from None
        raise _just_written(output) from None
    with locked(folder / LOCK_FILE, output):
        yield


@contextmanager
def locked(lock_file: Path, output: Path | str, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock in `lock_file`, for which to wait so long; on a file system without locks, hold nothing.

    The kernel releases it when this process ends, however that happens; forked processes do not hold it.

    Raises:
        LockedError: Another process holds it, so it is writing `output`.
    """
    # The fallback is a file that would remain if this process is killed.
    lock = filelock.FileLock(lock_file, timeout=timeout_s, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise LockedError(f"another process is writing {output}; wait for it, or choose another name") from None
    except FileNotFoundError:  # it has just removed its folder
        raise _just_written(output) from None
    except PermissionError:
        raise UserError(
            f"{lock_file} belongs to another user, whose interrupted job has left it; remove "
            f"{lock_file if lock_file.parent == output else lock_file.parent}, or choose another name"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        lock.release()


def _just_written(output: Path | str) -> UserError:
    return UserError(f"another process has just written {output}; use that, or choose another name")


def empty(folder: Path) -> None:
    """Remove what is in `folder`, except its lock."""
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            remove(path)


def replace_folder(path: Path, temporary: Path, own: tuple[str, ...] = ()) -> None:
    """Make the folder `temporary` durable and rename it to `path`; what was there is removed last.

    Args:
        own: Names of files in the folder that are removed once it has its name.
    """
    os.umask(hidden := os.umask(0))
    for file in temporary.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~hidden | file.stat().st_mode)  # safetensors makes files that only their owner can read
            fsync_file(file)
    old = None
    if path.exists():
        old = path.with_name(f"{temporary_name(path).name}-old")
        remove(old)
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        if old is not None:
            os.replace(old, path)
        raise
    for name in own:
        (path / name).unlink(missing_ok=True)
    if old is not None:
        remove(old)


def behind_link(path: Path) -> Path:
    """Where to write `path`: if it is a link, what it leads to, so that the link stays; "." and ".." have no name."""
    return path.resolve() if os.path.islink(path) or path.name in ("", "..") else path


def fsync_file(path: Path) -> None:
    """Write a closed file's content to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_links(path: Path, folder: Path) -> None:
    """Check that a file or folder within `folder`, which may come from elsewhere, leads to nothing outside it.

    A copy has what a link leads to, so a published copy would reveal it. In the Hub's cache all files are links, to
    `models--OWNER--NAME/blobs` of their own model.

    Raises:
        UserError: there is a link to something else.
    """
    root = folder.resolve()
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        target = entry.resolve()
        model = target.parent.parent
        is_in_cache = target.parent.name == "blobs" and model.name[:8] == "models--" and root.is_relative_to(model)
        if not (target.is_relative_to(root) or is_in_cache):
            raise UserError(
                f"{entry} is a link to {target}, outside {folder}, whose content would be copied and published; remove "
                "it, or put what belongs there in its place"
            )


def copy_part(folder: Path, name: str, target: Path) -> None:
    """Copy a file or folder in `folder`, or all of it (""), if it is there; files that exist are replaced.

    Raises:
        UserError: a link in it leads out of `folder`.
    """
    source = folder / name
    if source.exists():
        check_links(source, folder)
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            copy = target / path.relative_to(source)
            make_folder(copy.parent)
            shutil.copyfile(path, copy)
