"""The record of what a converter made a checkpoint from."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypedDict

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.base.records import FOREIGN, Record
from moelpr.base.run_folder import HF_FOLDER


class StartSettings(TypedDict, total=False):
    """How new experts started, the fields of `initialization.Start`."""

    new_experts: Literal["copied", "random"]
    noise: Annotated[float, Field(ge=0, lt=1e9)]
    reinitialise: Annotated[float, Field(ge=0, le=1)]
    seed: Annotated[int, Field(lt=1 << 64)]


@dataclass(frozen=True, config=FOREIGN)  # earlier versions wrote more fields
class Origin(Record):
    """What a converter made a checkpoint from; None for what is unknown or does not apply. The trainer copies it.

    Attributes:
        base_model: Name of the model's folder or on the Hub.
        settings: How new experts started.
        revision: Commit of the base on the Hub.
    """

    FILE_NAME: ClassVar[str] = "origin.json"
    REMEDY: ClassVar[str] = "restore it, or remove it, after which a model card says less"

    base_model: str | None = None
    settings: StartSettings = dataclasses.field(default_factory=StartSettings)
    revision: str | None = None

    @classmethod
    def of(cls, checkpoint: Path) -> Self:
        """The record of a checkpoint folder; one without fields if it has none."""
        return cls.read_if_there(checkpoint / HF_FOLDER) or cls()
