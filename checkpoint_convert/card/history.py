"""The training that made a model, stage by stage, from the records of the runs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.run_folder import METRICS_FILE, RECIPE_FILE, read_settings, read_versions
from moelpr.model.checkpoints.chain import RELEASE, BaseCheckpoint, step_folder
from moelpr.model.metrics.run_metrics import read_run_metrics
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import VOCABULARY_PARTS, Part, trained_parts, trains_new_rows_only


@dataclass(frozen=True)
class TrainedStage:
    """One run that trained the model, up to the step that the next run started from or that is exported.

    Attributes:
        settings: Every flag with its final value.
        first: The metrics of the first step, and `last` those of `step`; None if the run has none of `step`.
        versions: Versions of the packages at the run's last start.
    """

    folder: Path
    step: int
    settings: dict[str, Any]
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

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
        """Megatron's blend: prefixes, or alternating weights and prefixes; or the file that lists it."""
        blend = self.settings.get("data_path") or self.settings.get("train_data_path")
        if not isinstance(blend, list):
            listed = self.settings.get("data_args_path") or self.settings.get("per_split_data_args_path")
            return f"the list `{listed}`" if listed else ""
        blend = [str(item) for item in blend]
        if len(blend) % 2 == 0 and all(re.fullmatch(r"[\d.]+(e-?\d+)?", item) for item in blend[::2]):
            pairs = zip(blend[::2], blend[1::2], strict=True)
            return ", ".join(f"`{path}` (weight {weight})" for weight, path in pairs)
        return ", ".join(f"`{path}`" for path in blend)


@dataclass(frozen=True)
class History:
    """Stages, oldest first, and the folder that the oldest one started from if its records were not found."""

    stages: list[TrainedStage]
    missing: str | None = None


def read_history(checkpoint: Path, iteration: int | None = None) -> History:
    """The stages that trained the model in `checkpoint`, as far as their folders still exist under the same names.

    Args:
        iteration: Saved step; None for the latest.
    """
    spec = ModelSpec.read(checkpoint)
    stages: list[TrainedStage] = []
    seen: set[Path] = set()
    folder, step = checkpoint, step_folder(checkpoint, iteration)
    while step.name != RELEASE and folder.resolve() not in seen:
        seen.add(folder.resolve())
        settings = read_settings(step) or read_settings(folder)
        if settings is None:
            return History(stages[::-1], str(folder) if stages else None)
        stages.append(_read_stage(folder, int(step.name.removeprefix("iter_")), settings))
        first = _first_start(folder, settings)
        start = _start_of(folder, first or settings)
        started_from = _find_start(folder, Path(start), first, spec) if start else None
        if started_from is None:
            return History(stages[::-1], start)
        folder, step = started_from.parent, started_from
    return History(stages[::-1])


def _first_start(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that the run in `folder` first started with; None if only resumed starts are recorded."""
    saved = [read_settings(path.parent) for path in sorted(folder.glob(f"iter_*/{RECIPE_FILE}"))]
    return next((start for start in [settings, *saved] if start and not start.get("is_resumed")), None)


def _start_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """The folder, as named then, that the run in `folder` took its weights from at its first start."""
    own = [folder.resolve(), Path(settings.get("save") or folder).resolve()]
    starts = [settings.get(name) for name in ("model_source", "pretrained_checkpoint")]
    return next((start for start in starts if start and Path(start).resolve() not in own), None)


def _find_start(folder: Path, start: Path, first: dict[str, Any] | None, spec: ModelSpec) -> Path | None:
    """The step folder that the run started from; None if it is missing or ambiguous."""
    try:
        base = BaseCheckpoint.read_if_there(folder)
        if base is not None:
            return base.find(folder)
        if not _has_spec(start, spec) or (first is None and len(list(start.glob("iter_*"))) > 1):
            return None
        if first and isinstance(step := first.get("model_step"), str):
            return start / step if Path(step).name == step and (start / step).is_dir() else None
        return step_folder(start, first.get("ckpt_step") if first else None)  # a version that did not record the step
    except UserError:
        return None


def _has_spec(checkpoint: Path, spec: ModelSpec) -> bool:
    try:
        return ModelSpec.read(checkpoint) == spec
    except UserError:
        return False


def _read_stage(folder: Path, step: int, settings: dict[str, Any]) -> TrainedStage:
    try:
        records = [record for record in read_run_metrics(folder / METRICS_FILE).steps if record["iteration"] <= step]
    except UserError:
        records = []
    reaches_step = bool(records) and records[-1]["iteration"] == step
    first, last = (records[0], records[-1]) if reaches_step else (None, None)
    return TrainedStage(folder, step, settings, first, last, read_versions(folder))
