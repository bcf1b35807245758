"""How a model was made: its base, how new experts started, and the stages that trained it.

The converter writes the record next to a checkpoint. A run appends what trained its start, and passes it on.
"""

import re
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic.dataclasses import dataclass

from moelpr.base.errors import UserError
from moelpr.base.records import FOREIGN, Record
from moelpr.base.run_folder import HF_FOLDER, METRICS_FILE, read_settings, read_versions
from moelpr.model.checkpoints.chain import RELEASE
from moelpr.model.metrics.run_metrics import read_run_metrics
from moelpr.model.stages import VOCABULARY_PARTS, Part, trained_parts, trains_new_rows_only


@dataclass(frozen=True, config=FOREIGN)
class TrainedStage:
    """One run that trained the model, up to the step that the next run started from or that is exported.

    Attributes:
        folder: The run folder.
        step: The number of that step.
        settings: Every flag with its final value.
        first: The metrics of the first step, and `last` those of `step`; None if the run has none of `step`.
        versions: Versions of the packages at the run's last start.
    """

    folder: str
    step: int
    settings: dict[str, Any]
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, step: Path) -> Self | None:
        """The run that saved the folder `step`; None if its settings are not recorded."""
        folder, number = step.parent, int(step.name.removeprefix("iter_"))
        if (settings := read_settings(step) or read_settings(folder)) is None:
            return None
        try:
            records = [one for one in read_run_metrics(folder / METRICS_FILE).steps if one["iteration"] <= number]
        except UserError:
            records = []
        reaches_step = bool(records) and records[-1]["iteration"] == number
        first, last = (records[0], records[-1]) if reaches_step else (None, None)
        return cls(str(folder), number, settings, first, last, read_versions(folder))

    @property
    def trained(self) -> frozenset[Part]:
        """The parts that it trained; empty for an unknown stage."""
        stage: Any = self.settings.get("stage")
        flags = (bool(self.settings.get(name)) for name in ("train_everything", "train_new_embeddings"))
        try:
            return trained_parts(stage, *flags)
        except KeyError:
            return frozenset()

    @property
    def trained_names(self) -> list[str]:
        """The parts that it trained, for readers."""
        names = {part.value for part in self.trained}
        stage: Any = self.settings.get("stage")
        if trains_new_rows_only(stage, bool(self.settings.get("train_new_embeddings"))):
            names = names - {part.value for part in VOCABULARY_PARTS} | {"rows of new tokens"}
        return sorted(names)

    @property
    def trained_everything(self) -> bool:
        return self.trained == frozenset(Part)

    def filled(self, template: str) -> str:
        """`template` with the settings that it names; empty if one is not recorded as it should be."""
        names = re.findall(r"\{(\w+)", template)
        if any(self.settings.get(name) is None for name in names):
            return ""
        try:
            return template.format_map(self.settings)
        except (ValueError, TypeError, OverflowError):  # a recipe that was edited: text where a number belongs
            return ""

    def change(self, metric: str) -> str:
        """A metric of the first and the last step; empty if neither is recorded."""
        values = [(record or {}).get(metric) for record in (self.first, self.last)]
        return "" if values == [None, None] else " to ".join("–" if v is None else f"{v:.4g}" for v in values)

    @property
    def data(self) -> str:
        """Megatron's blend: prefixes, or alternating weights and prefixes."""
        blend = self.settings.get("data_path")
        blend = [str(item) for item in blend] if isinstance(blend, list) else []
        if len(blend) % 2 == 0 and all(re.fullmatch(r"[\d.]+(e-?\d+)?", item) for item in blend[::2]):
            pairs = zip(blend[::2], blend[1::2], strict=True)
            return ", ".join(f"`{path}` (weight {weight})" for weight, path in pairs)
        return ", ".join(f"`{path}`" for path in blend)


@dataclass(frozen=True, config=FOREIGN)  # earlier versions wrote more fields
class Lineage(Record):
    """The base of a checkpoint, and the training that its run started from; a field is None if it is unknown.

    Attributes:
        base_model: Name of the model's folder or on the Hub.
        settings: How new experts started, the fields of `initialization.Start`.
        revision: Commit of the base on the Hub.
        stages: The stages that trained the model, oldest first.
        is_complete: Whether they are all.
    """

    FILE_NAME: ClassVar[str] = "origin.json"
    REMEDY: ClassVar[str] = "restore it, or remove it, after which a model card says less"

    base_model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    stages: list[TrainedStage] = field(default_factory=list)
    is_complete: bool = False

    @classmethod
    def of(cls, step: Path) -> Self:
        """The lineage of the model in a step folder, including the run that saved it."""
        before = cls.read_if_there(step.parent / HF_FOLDER) or cls()
        if step.name == RELEASE:
            return replace(before, is_complete=True)
        stage = TrainedStage.read(step)
        return replace(before, is_complete=False) if stage is None else replace(before, stages=[*before.stages, stage])
