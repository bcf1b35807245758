"""Results that are kept as they come: a part is one model on one language, so a killed evaluation goes on.

A part says what it is of: model, text and settings. One that is of something else is measured anew.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moelpr.checkpoints import checkpoint_chain
from moelpr.errors import UserError
from moelpr.evaluate.models import is_megatron
from moelpr.files import atomic_file
from moelpr.run_folder import HF_FOLDER

FORMAT_VERSION = 1
FOLDER = "parts"


class Parts:
    """The parts in an evaluation's folder: `parts/MODEL/NAME.json`."""

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"the output {folder} is a file; give a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / FOLDER).is_dir():
            raise UserError(f"the output folder {folder} holds other things than an evaluation; give another one")
        self._folder = folder / FOLDER

    def read(self, model: str, name: str, of: dict[str, Any]) -> dict[str, Any] | None:
        """The result of an earlier run; None where there is none of exactly this."""
        try:
            content = json.loads(self._path(model, name).read_text(encoding="utf-8"))
            return content["result"] if content["of"] == _key(of) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, model: str, name: str, of: dict[str, Any], result: dict[str, Any]) -> None:
        with atomic_file(self._path(model, name)) as temporary:
            temporary.write_text(json.dumps({"of": _key(of), "result": result}) + "\n", encoding="utf-8")

    def _path(self, model: str, name: str) -> Path:
        return self._folder / quote(model, safe="") / f"{quote(name, safe='')}.json"


def _key(of: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **of}


def fingerprint_text(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def fingerprint_model(directory: Path) -> str:
    """Changes when one of the model's files is written anew: names, sizes, times; weights are too large to be read."""
    if is_megatron(directory):
        folders = [directory / HF_FOLDER, *checkpoint_chain(directory)]
        files = [directory / "model_spec.json", *(file for folder in folders for file in folder.rglob("*"))]
    else:
        files = [file for file in directory.iterdir() if file.suffix != ".md"]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
