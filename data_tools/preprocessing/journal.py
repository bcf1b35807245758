"""What an interrupted job leaves for the one that goes on with it: a hidden folder beside the output."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from data_tools.corpus_writer import make_folder
from moelpr.errors import UserError
from moelpr.files import LOCK_FILE, atomic_file, empty, locked

_STATE = "state.json"
_SKIPPED = "skipped.txt"


def unfinished_folder(output_prefix: str) -> Path:
    """Where a job keeps what is not finished."""
    path = Path(output_prefix)
    return path.with_name(f".{path.name}.unfinished")


class Journal:
    """The folder of an unfinished job, locked while the job runs. As a context manager it is removed on the way out,
    but where the job may be resumed and has not ended well.

    Args:
        output_prefix: the job's own, with its shard.
        settings: all that decides the job's bytes; one that goes on must have the same.
        resume: go on with what is there, and leave the folder where the job fails.

    Attributes:
        folder: for unfinished files.
        spool: for files that need not outlive the process.
        state: what was saved last; None: the job starts from the beginning.

    Raises:
        UserError: another job is writing there, or what is to be gone on with had other settings.
    """

    def __init__(self, output_prefix: str, settings: dict[str, Any], resume: bool) -> None:
        self.folder = unfinished_folder(output_prefix)
        make_folder(self.folder)
        self._lock = ExitStack()
        self._lock.enter_context(locked(self.folder / LOCK_FILE, output_prefix))
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._keep = resume
        self.state: dict[str, Any] | None = self._read() if resume else None
        if self.state is None:
            empty(self.folder)
        self.spool = self.folder / "spool"
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir()
        self._skipped_bytes = 0 if self.state is None else self.state["skipped_bytes"]
        self._skipped = open(self.folder / _SKIPPED, "ab")
        if (self.folder / _SKIPPED).stat().st_size > self._skipped_bytes:
            self._skipped.truncate(self._skipped_bytes)

    def add_problems(self, problems: list[str]) -> None:
        """Note skipped lines."""
        text = "".join(f"{problem}\n" for problem in problems).encode(errors="backslashreplace")
        self._skipped.write(text)
        self._skipped_bytes += len(text)

    def save(self, state: dict[str, Any]) -> None:
        """Save what a job needs to go on from here; what it wrote so far must be on the disk."""
        self._skipped.flush()
        os.fsync(self._skipped.fileno())
        self.state = {**state, "settings": self._settings, "skipped_bytes": self._skipped_bytes}
        with atomic_file(self.folder / _STATE) as temporary:
            temporary.write_text(json.dumps(self.state), "utf-8")

    def keep_problems(self, path: Path) -> None:
        """Give the list of skipped lines its name; without any, an older list goes."""
        self._skipped.close()
        unfinished = self.folder / _SKIPPED
        if self._skipped_bytes == 0:
            path.unlink(missing_ok=True)
        elif unfinished.stat().st_size:  # else an interrupted job has done it
            os.replace(unfinished, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._skipped.close()
        if kind is None or not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / _STATE
        try:
            state: dict[str, Any] = json.loads(path.read_bytes())
            found = state["settings"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged, so the job can't be resumed; leave out --resume") from error
        for name in self._settings.keys() | found.keys():
            if found.get(name) != self._settings.get(name):
                raise UserError(
                    f"the unfinished job in {self.folder} was started with other {name}; give it the same, or leave "
                    f"out --resume to start afresh"
                )
        return state
