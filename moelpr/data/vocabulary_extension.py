"""The file that lists an extended tokenizer's new tokens, and the old tokens that each of them replaces."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record

VOCABULARY_EXTENSION_FILE = "vocabulary_extension.json"
_REMEDY = "pass a folder that moelpr data extend-tokenizer wrote"


@dataclass(frozen=True, config=STRICT)
class VocabularyExtension(Record):
    """New tokens of a tokenizer, as moelpr data extend-tokenizer writes them next to it.

    Attributes:
        first_new_id: ID of the first new token: the old tokenizer's highest ID + 1, added tokens included.
        replaces: For each new token, in order of their IDs, the old tokens that wrote the same text.
        old_fingerprint: `Tokenizer.fingerprint()` of the old tokenizer.
        old_vocabulary_sha256: `vocabulary_checksum` of the IDs below `first_new_id`.
    """

    FILE_NAME: ClassVar[str] = VOCABULARY_EXTENSION_FILE
    REMEDY: ClassVar[str] = _REMEDY
    MISSING: ClassVar[str] = f"has no {VOCABULARY_EXTENSION_FILE}; {_REMEDY}"
    INDENT: ClassVar[int | None] = None

    first_new_id: Annotated[int, Field(ge=1, lt=1 << 31)]
    replaces: Annotated[list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]], Field(min_length=1)]
    old_fingerprint: str
    old_vocabulary_sha256: str

    def __post_init__(self) -> None:
        if max(map(max, self.replaces)) >= self.first_new_id:
            raise UserError(f"replaces must contain IDs of old tokens, 0 to {self.first_new_id - 1}")

    @property
    def number(self) -> int:
        """Number of new tokens; their IDs are first_new_id, first_new_id + 1, …"""
        return len(self.replaces)
