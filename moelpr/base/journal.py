"""The journal of an output that takes long: what of it is complete, so that an interrupted job goes on from there.

A job writes into a folder of its own, `.NAME.partial` or `.NAME.unfinished`, which it locks. The journal in this folder
is a file of JSON lines. The first describes the job: everything that the output depends on. Each other line is an entry
that was added when what it names was on disk. A job with another description starts from an empty folder.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic_core

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.files import (
    LOCK_FILE,
    behind_link,
    empty,
    locked_folder,
    remove_leftovers,
    remove_temporaries,
    replace_folder,
    write_text,
)

JOURNAL_FILE = ".journal"


class Journal:
    """The journal of a job in `folder`, which the caller has locked and which the job alone writes to.

    Entries are dataclasses or named tuples whose fields pydantic can read.

    Args:
        job: Values of JSON that describe the job. If the journal that is there has another description, or none is
            there, the folder is emptied first.
    """

    def __init__(self, folder: Path, job: Any) -> None:
        self.folder = folder
        self._path = folder / JOURNAL_FILE
        lines = _complete_lines(self._path)
        header = _line({"job": job})
        if not lines or self.job_in(folder) != json.loads(header)["job"]:
            empty(folder)
            lines = [header]
        self._read = lines[1:]
        # Without a line that was cut off when its writer was killed.
        write_text(self._path, b"".join(lines).decode())

    def entries[T](self, kind: type[T]) -> list[T]:
        """The entries that were there when the journal was opened."""
        return [records.parse(kind, line, str(self._path), _remedy(self.folder)) for line in self._read]

    def last[T](self, kind: type[T]) -> T | None:
        """The last of these entries; None if there are none."""
        self._read = self._read[-1:]
        return next(iter(self.entries(kind)), None)

    def add(self, entry: object) -> None:
        """Add an entry, and return when it is on disk."""
        with open(self._path, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def job_in(folder: Path) -> Any:
        """The description of the job that was interrupted in `folder`; None if it has no journal."""
        if not (lines := _complete_lines(folder / JOURNAL_FILE)):
            return None
        return records.parse(dict[str, Any], lines[0], str(folder / JOURNAL_FILE), _remedy(folder)).get("job")


@contextmanager
def resumable_directory(path: Path, job: Any) -> Iterator[Journal]:
    """Yield the journal of a temporary folder that becomes `path` on success.

    Like `atomic_directory`, but the folder `.NAME.partial` next to `path` stays unless the job succeeds or fails with a
    UserError, and the next run of the same job finds there what was written.

    Raises:
        UserError: Another process is writing to the folder.
    """
    path = behind_link(path)
    remove_leftovers(path)
    partial = partial_name(path)
    with locked_folder(partial, path):
        journal = Journal(partial, job)
        remove_temporaries(partial)
        try:
            yield journal
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # The journal stays until then: after a kill, this job would start from an empty folder, or another empty it.
        replace_folder(path, partial, own=(JOURNAL_FILE, LOCK_FILE))


def partial_name(path: Path) -> Path:
    """The folder in which `resumable_directory` keeps what has been written of `path`."""
    return path.with_name(f".{path.name}.partial")


def _complete_lines(path: Path) -> list[bytes]:
    if not path.is_file():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _line(value: object) -> bytes:
    return pydantic_core.to_json(value) + b"\n"


def _remedy(folder: Path) -> str:
    return f"remove the folder {folder} to start again"
