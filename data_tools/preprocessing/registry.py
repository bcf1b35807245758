"""The published code's registry of datasets, `dataset_info.json`."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.records import FOREIGN
from moelpr.data.manifest import Bit
from moelpr.data.text.sources import Source, find_files, open_source

_BITS: dict[str, Bit] = {"old": "original", "original": "original", "new": "expanded", "expanded": "expanded"}


class Dataset(NamedTuple):
    """Input files that share a language and a key."""

    name: str  # name in the registry; "" for files named by --input
    sources: list[Source]
    bit: Bit | None  # the language bit; None if each document has its own
    key: str  # key of the text in each document


@dataclass(config=FOREIGN)
class _Columns:
    """The keys of a dataset's documents.

    Attributes:
        prompt: The key of the text.
    """

    prompt: str = "text"


@dataclass(config=FOREIGN)
class _Entry:
    """A dataset of the published code's registry.

    Attributes:
        file_name: The file, folder or glob pattern in --dataset-dir.
        language: The language bit of all documents.
        columns: The keys of the documents.
        formatting: Other formats are conversations, which are not read.
        file_sha1: SHA-1 of the file.
    """

    file_name: str
    language: Literal["old", "original", "new", "expanded"]
    columns: _Columns = Field(default_factory=_Columns)
    formatting: Literal["alpaca"] = "alpaca"
    file_sha1: Annotated[str, Field(pattern="^[0-9a-fA-F]{40}$")] | None = None


def read_registry(registry: Path, names: list[str], folder: Path | None) -> list[Dataset]:
    """Read the named entries of a registry, whose files are in a folder, by default its own."""
    folder = folder or registry.parent
    entries = records.read(dict[str, Any], registry, "pass a JSON object of datasets as --dataset-info")
    if len(set(names)) < len(names):
        raise UserError(f"--dataset {','.join(names)} names a dataset twice")
    datasets = []
    for index, name in enumerate(names):
        if name not in entries:
            near = get_close_matches(name, entries, 3) or sorted(entries)[:5]
            raise UserError(f"the registry {registry} has no dataset {name}; choose one of {', '.join(near)}")
        where = f"the dataset {name} in {registry}"
        remedy = "correct it (docs/corpora.md#languages); nothing is downloaded from hubs"
        entry = records.validate(_Entry, entries[name], where, remedy)
        path = folder / entry.file_name
        if not path.exists():
            raise UserError(f"{where}: {path} does not exist; copy it there, or pass --dataset-dir")
        if entry.file_sha1 and path.is_dir():
            raise UserError(f"{where}: its file_name is a folder, which has no SHA-1; remove file_sha1")
        sha1 = entry.file_sha1.lower() if entry.file_sha1 else None
        sources = [open_source(file, index, sha1) for file in find_files([str(path)])]
        datasets.append(Dataset(name, sources, _BITS[entry.language], entry.columns.prompt))
    return datasets
