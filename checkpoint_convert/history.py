"""What the folders of a model's runs say about how it came to be: conversion, then one stage after the other."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.checkpoints import RELEASE, BaseCheckpoint, step_folder
from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import HF_FOLDER, METRICS_FILE, RECIPE_FILE, VERSIONS_FILE, read_json, read_settings
from moelpr.run_metrics import read_metrics

# Beside a checkpoint's config and tokenizer, so that the trainer carries it along.
ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What a converter made a checkpoint from.

    base_model: name of the model's folder, or what an adapter calls its base. settings: how new experts started.
    adapter: name of the published code's adapter that brought them, if one did. copy_of: step folder whose weights the
    checkpoint has, if it is a copy.
    """

    base_model: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    copy_of: str | None = None

    def write(self, checkpoint: Path) -> None:
        (checkpoint / HF_FOLDER).mkdir(exist_ok=True)
        (checkpoint / HF_FOLDER / ORIGIN_FILE).write_text(json.dumps(vars(self), indent=2) + "\n")

    @classmethod
    def read(cls, checkpoint: Path) -> "Origin | None":
        """None where no converter has left word."""
        content = read_json(checkpoint / HF_FOLDER / ORIGIN_FILE)
        if content is None:
            return None
        names = [name if isinstance(name := content.get(key), str) else None for key in _NAMES]
        settings = content.get("settings")
        return cls(names[0], settings if isinstance(settings, dict) else {}, *names[1:])


_NAMES = ("base_model", "adapter", "copy_of")


@dataclass(frozen=True)
class Stage:
    """One run that trained the model, up to the step that the next one, or the reader, took.

    settings: every flag with its final value. first, last: the records of the first step and of `step`; None where the
    run left none. versions: of the programs at its last start; empty where it left none.
    """

    folder: Path
    step: int
    settings: dict[str, Any]
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def trained_everything(self) -> bool:
        return bool(self.settings.get("train_everything")) or self.settings.get("stage") == "dense"


@dataclass(frozen=True)
class History:
    """Stages, oldest first. missing: the folder that the oldest one started from, where its records can't be found."""

    stages: list[Stage]
    missing: str | None = None


def read_history(checkpoint: Path, iteration: int | None = None) -> History:
    """The stages that made the model in the folder `checkpoint`, as far as their folders are still where they were.

    iteration: saved step; None for the latest. A folder with another model counts as missing.
    """
    spec = ModelSpec.read(checkpoint)
    stages: list[Stage] = []
    seen: set[Path] = set()
    folder, step = checkpoint, step_folder(checkpoint, iteration)
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        if step.name == RELEASE:
            origin = Origin.read(folder)
            if origin is None or origin.copy_of is None:
                break
            original = Path(origin.copy_of)
            if not original.is_dir() or not _is_of(original.parent, spec):
                return History(stages[::-1], origin.copy_of)
            folder, step = original.parent, original
            continue
        settings = read_settings(step) or read_settings(folder)
        if settings is None:
            return History(stages[::-1], str(folder) if stages else None)
        stages.append(_read_stage(folder, int(step.name.removeprefix("iter_")), settings))
        first = _first_start(folder, settings)
        start = _start_of(folder, first or settings)
        if start is None:
            return History(stages[::-1])
        found = _find(folder, Path(start), first, spec)
        if found is None:
            return History(stages[::-1], start)
        folder, step = found.parent, found
    return History(stages[::-1])


def _first_start(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that the run in `folder` first started with; None where only resumed starts are on record."""
    saved = [read_settings(path.parent) for path in sorted(folder.glob(f"iter_*/{RECIPE_FILE}"))]
    return next((start for start in [settings, *saved] if start and not start.get("is_resumed")), None)


def _start_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """The folder that the run in `folder` took its weights from when it first started, as it was called then."""
    own = [folder.resolve(), *(Path(settings[name]).resolve() for name in ("save",) if settings.get(name))]
    starts = [settings.get(name) for name in ("model_source", "pretrained_checkpoint")]
    return next((start for start in starts if start and Path(start).resolve() not in own), None)


def _find(folder: Path, start: Path, first: dict[str, Any] | None, spec: ModelSpec) -> Path | None:
    """The step folder that was started from; None where it isn't to be found, or one can't tell which it was."""
    try:
        base = BaseCheckpoint.read(folder)
        if base is not None:
            return base.find(folder)
        if not _is_of(start, spec) or (first is None and len(list(start.glob("iter_*"))) > 1):
            return None
        return step_folder(start, first.get("ckpt_step") if first else None)
    except UserError:
        return None


def _is_of(checkpoint: Path, spec: ModelSpec) -> bool:
    try:
        return ModelSpec.read(checkpoint) == spec
    except UserError:
        return False


def _read_stage(folder: Path, step: int, settings: dict[str, Any]) -> Stage:
    try:
        records = [record for record in read_metrics(folder / METRICS_FILE) if record["iteration"] <= step]
    except UserError:
        records = []
    is_whole = bool(records) and records[-1]["iteration"] == step
    first, last = (records[0], records[-1]) if is_whole else (None, None)
    return Stage(folder, step, settings, first, last, read_json(folder / VERSIONS_FILE) or {})
