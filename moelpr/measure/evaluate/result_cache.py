"""Results of an evaluation, kept as they come so that a rerun resumes."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.files import make_folder, write_text
from moelpr.base.records import STRICT
from moelpr.base.run_folder import HF_FOLDER
from moelpr.measure.evaluate.models import is_megatron
from moelpr.model.checkpoints.chain import checkpoint_chain
from moelpr.model.families.hf_config import is_gguf
from moelpr.model.model_spec import FILE_NAME

Json = dict[str, Any]

CACHE_FOLDER = "parts"
_VERSION = {"format_version": 4}


@dataclass(frozen=True, config=STRICT)
class KeptResult:
    """A file of the cache.

    Attributes:
        of: What the result was computed from, and the version of the format.
        result: The result.
        crc32: CRC-32 of the result as JSON.
    """

    of: Json
    result: Json
    crc32: str


class ResultCache:
    """Results in an evaluation's folder, one file each (`parts/MODEL/NAME.json`), so that a rerun resumes.

    Each file records what it was computed from, and a checksum. A result with a different key or checksum is not used,
    but computed again. These are files and not entries of a `moelpr.base.journal.Journal`, because results outlive
    the job: after a model or a text has changed, the others are still used, and a damaged one is the only loss.
    """

    def __init__(self, folder: Path | None):
        """`folder` is the evaluation's --output; None caches nothing."""
        self.folder = folder and folder / CACHE_FOLDER
        if folder and self.folder:
            is_foreign = not self.folder.is_dir() and folder.is_dir() and any(folder.iterdir())
            if is_foreign or folder.is_file():
                raise UserError(f"--output {folder} is not an evaluation folder; choose another")
            make_folder(self.folder)  # now, because measuring takes long

    def read(self, model: str, name: str, key: Json) -> Json | None:
        """The result computed from exactly `key`, or None, also if the file is damaged."""
        if self.folder:
            with suppress(UserError):
                kept = records.read(KeptResult, self._path(model, name), "evaluate again")
                return kept.result if kept.crc32 == _checksum(kept.result) and kept.of == {**_VERSION, **key} else None
        return None

    def write(self, model: str, name: str, key: Json, result: Json) -> None:
        if self.folder:
            kept = KeptResult({**_VERSION, **key}, result, _checksum(result))
            write_text(self._path(model, name), json.dumps(asdict(kept)) + "\n")

    def complete(
        self, model: str, keys: Mapping[str, Json], measure: Callable[[list[str]], Iterable[tuple[str, Json]]]
    ) -> dict[str, Json]:
        """Results of a model: the cached ones, and those that `measure` yields, which are cached as they come.

        Args:
            keys: name of a result -> what it is computed from.
            measure: yields (name, result) for the names that are missing, which it gets in the order of `keys`.
        """
        results = {name: result for name, key in keys.items() if (result := self.read(model, name, key)) is not None}
        if missing := [name for name in keys if name not in results]:
            for name, result in measure(missing):
                results[name] = result
                self.write(model, name, keys[name], result)
        return results

    def _path(self, model: str, name: str) -> Path:
        assert self.folder
        return self.folder / quote(model, safe="") / f"{quote(name, safe='')}.json"


def _checksum(result: Json) -> str:
    return f"{zlib.crc32(json.dumps(result).encode()):08x}"


def fingerprint_model(directory: Path) -> str:
    """A digest of its files' names, sizes and times; the weights are too large to be read."""
    if is_gguf(directory):
        return fingerprint_files([directory])
    if is_megatron(directory):
        folders = [directory / HF_FOLDER, *checkpoint_chain(directory)]
        return fingerprint_files([directory / FILE_NAME, *(file for folder in folders for file in folder.rglob("*"))])
    return fingerprint_files(file for file in directory.iterdir() if file.suffix != ".md")


def fingerprint_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
