"""The data registry of the published code, dataset_info.json: named datasets with their files, languages and keys."""

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data_tools.preprocessing.sources import Source, find_files, open_source
from moelpr.errors import UserError

REGISTRY_FILE = "dataset_info.json"
_LANGUAGES = {"old": "original", "original": "original", "new": "expanded", "expanded": "expanded"}


@dataclass(frozen=True)
class Dataset:
    """One entry.

    Attributes:
        language: "original" or "expanded".
        key: of the text in each document.
    """

    name: str
    sources: list[Source]
    language: str
    key: str


def read_registry(registry: Path, names: list[str], folder: Path) -> list[Dataset]:
    """The named entries of a registry, in the order of the names.

    Args:
        folder: where their files are.

    Raises:
        UserError: the registry can't be read, or an entry is missing or can't be used.
    """
    try:
        entries = json.loads(registry.read_bytes())
    except OSError as error:
        raise UserError(
            f"the registry {registry} can't be read ({error.strerror}); name it with --dataset-info"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the registry {registry} is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise UserError(f"the registry {registry} does not hold a JSON object of datasets")
    if len(set(names)) < len(names):
        raise UserError(f"--dataset {','.join(names)} names a dataset twice")
    datasets = []
    for index, name in enumerate(names):
        if name not in entries:
            near = get_close_matches(name, entries, 3) or sorted(entries)[:5]
            raise UserError(f"the registry {registry} has no dataset {name}; it has {', '.join(near)}")
        try:
            datasets.append(_dataset(name, entries[name], folder, index))
        except ValueError as error:
            raise UserError(f"the dataset {name} in {registry}: {error}") from error
    return datasets


def verify_checksum(source: Source) -> None:
    """Compare a file with the SHA-1 that its registry states; reads all of it.

    Raises:
        UserError: it is another file, or damaged.
    """
    with open(source.path, "rb") as file:
        found = hashlib.file_digest(file, "sha1").hexdigest()
    if found != source.sha1:
        raise UserError(
            f"{source.path} has the SHA-1 {found}, its registry says {source.sha1}; fetch it again or correct file_sha1"
        )


def _dataset(name: str, entry: Any, folder: Path, index: int) -> Dataset:
    if not isinstance(entry, dict):
        raise UserError("an object was expected")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str):
        raise UserError("it has no file_name; nothing is downloaded from hubs, name a file or folder on this machine")
    language = entry.get("language")
    if language not in _LANGUAGES:
        raise UserError(f'its language is {json.dumps(language)}; "old" (original) or "new" (expanded) is wanted')
    columns = entry.get("columns", {})
    key = columns.get("prompt", "text") if isinstance(columns, dict) else None
    if not isinstance(key, str):
        raise UserError('its columns hold no "prompt", the key of the text')
    if entry.get("formatting", "alpaca") != "alpaca":
        raise UserError(f"its formatting is {json.dumps(entry['formatting'])}; plain documents are wanted")
    path = folder / file_name
    if not path.exists():
        raise UserError(f"there is no {path}")
    sha1 = entry.get("file_sha1")
    if sha1 is not None and (not isinstance(sha1, str) or len(sha1) != 40):
        raise UserError(f"its file_sha1 is {json.dumps(sha1)}; 40 hexadecimal digits are wanted")
    if sha1 and path.is_dir():
        raise UserError("its file_name is a folder, which has no SHA-1; leave file_sha1 out")
    sources = [open_source(file, index, sha1.lower() if sha1 else None) for file in find_files([str(path)])]
    return Dataset(name, sources, _LANGUAGES[language], key)
