"""The record of what a converter made a checkpoint from."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic.dataclasses import dataclass

from moelpr.base.records import FOREIGN, Record
from moelpr.base.run_folder import HF_FOLDER


@dataclass(frozen=True, config=FOREIGN)  # earlier versions wrote more fields
class Origin(Record):
    """The base of a checkpoint; a field is None if it is unknown or does not apply. The trainer copies the record.

    Attributes:
        base_model: Name of the model's folder or on the Hub.
        settings: How new experts started, the fields of `initialization.Start`.
        revision: Commit of the base on the Hub.
    """

    FILE_NAME: ClassVar[str] = "origin.json"
    REMEDY: ClassVar[str] = "restore it, or remove it, after which a model card says less"

    base_model: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    revision: str | None = None

    @classmethod
    def of(cls, checkpoint: Path) -> Self:
        """The record of a checkpoint folder; one without fields if it has none."""
        return cls.read_if_there(checkpoint / HF_FOLDER) or cls()
