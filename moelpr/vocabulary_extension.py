"""The file that lists an extended tokenizer's new tokens, and the old tokens that each of them replaces."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moelpr.errors import UserError
from moelpr.files import read_versioned, write_text

VOCABULARY_EXTENSION_FILE = "vocabulary_extension.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class VocabularyExtension:
    """New tokens of a tokenizer, as data_tools/extend_tokenizer.py writes them beside it.

    Attributes:
        first_new_id: ID of the first new token: the old tokenizer's highest ID + 1, added tokens included.
        replaces: for each new token, in order of their IDs, the old tokens that wrote the same text.
        old_fingerprint: `Tokenizer.fingerprint()` of the old tokenizer.
        old_vocabulary_sha256: `vocabulary_checksum` of the IDs below `first_new_id`.
    """

    first_new_id: int
    replaces: list[list[int]]
    old_fingerprint: str
    old_vocabulary_sha256: str

    def __post_init__(self) -> None:
        is_id = type(self.first_new_id) is int and 1 <= self.first_new_id < 1 << 31
        if not is_id or type(self.replaces) is not list:
            raise ValueError("first_new_id must be an integer from 1 to 2^31 - 1, and replaces a list")
        if not self.replaces or not all(type(ids) is list and ids for ids in self.replaces):
            raise ValueError("replaces must list at least one old token for each new one")
        if not all(type(id) is int and 0 <= id < self.first_new_id for ids in self.replaces for id in ids):
            raise ValueError(f"replaces must contain IDs of old tokens, 0 to {self.first_new_id - 1}")
        if type(self.old_fingerprint) is not str or type(self.old_vocabulary_sha256) is not str:
            raise ValueError("old_fingerprint and old_vocabulary_sha256 must be strings")

    @property
    def number(self) -> int:
        """Number of new tokens; their IDs are first_new_id, first_new_id + 1, …"""
        return len(self.replaces)

    @classmethod
    def read(cls, folder: Path) -> "VocabularyExtension":
        """Read the file of a tokenizer's folder.

        Raises:
            UserError: The folder has no such file, or it is damaged.
        """
        path = Path(folder) / VOCABULARY_EXTENSION_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {VOCABULARY_EXTENSION_FILE}; pass a folder that data_tools/extend_tokenizer.py wrote"
            )
        return read_versioned(path, _FORMAT_VERSION, cls)

    def write(self, folder: Path) -> None:
        """Write the file into a tokenizer's folder."""
        content = {"format_version": _FORMAT_VERSION, **asdict(self)}
        write_text(Path(folder) / VOCABULARY_EXTENSION_FILE, json.dumps(content) + "\n")
