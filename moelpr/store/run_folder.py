"""The files of a run folder (`--save`) and of a checkpoint folder, and their readers.

model_spec.json                     the model's family, shape and experts (moelpr.model_spec)
hf/                                 configuration and tokenizer of the Hugging Face model it came from
latest_checkpointed_iteration.txt   the last saved step (Megatron's tracker file)
iter_0000500/, release/             one saved step each (moelpr.checkpoints.chain)
base_checkpoint.json                where the frozen tensors are, if only trained tensors were saved
recipe.yaml                         every flag with its final value; also inside each saved step
command.json, versions.json         command line and package versions of the last start
metrics.jsonl                       one line per training step, validation pass or warning (moelpr.metrics.run_metrics)
STOP, FINISHED                      asks the run to stop; marks a run that has made all its steps
FAILURES                            failed starts of a Slurm job (launch/slurm/stage.sbatch)
.lock                               locked while a run writes to the folder (moelpr.training.run_lock)
"""

from pathlib import Path
from typing import Any

from moelpr.process.errors import UserError
from moelpr.store.files import parse_json
from moelpr.store.yaml_files import read_mapping

HF_FOLDER = "hf"
# Tables of contents of a saved step, beside its .distcp files. Megatron writes the second when the step is complete.
METADATA_FILE, MEGATRON_CONFIG_FILE = TABLE_FILES = ".metadata", "metadata.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
BASE_CHECKPOINT_FILE = "base_checkpoint.json"
RECIPE_FILE = "recipe.yaml"
COMMAND_FILE = "command.json"
VERSIONS_FILE = "versions.json"
METRICS_FILE = "metrics.jsonl"
STOP_FILE = "STOP"
FINISHED_FILE = "FINISHED"
_LARGEST = 10**12  # steps, samples and ranks are fewer
# Of settings in a recipe that others than the trainer use.
_TYPES: dict[str, Any] = {
    "stage": str, "save": str | None, "model_source": str | None, "pretrained_checkpoint": str | None,
    "model_step": str | None, "ckpt_step": int | None, "world_size": int | None, "train_iters": int | None,
    "train_samples": int | None, "virtual_pipeline_model_parallel_size": int | None, "data_path": list | str | None,
}  # fmt: skip


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The resolved flags in `folder`/recipe.yaml, without values of a wrong type; None if it is missing or damaged."""
    try:
        settings = read_mapping(folder / RECIPE_FILE, "recipe")
    except UserError:
        return None
    return usable(settings)


def usable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe.yaml without values of a wrong type."""
    return {name: value for name, value in settings.items() if name not in _TYPES or _is_usable(value, _TYPES[name])}


def _is_usable(value: Any, kind: Any) -> bool:
    """Whether a value has its type, and can be computed with or name a file."""
    is_too_large = isinstance(value, int) and abs(value) > _LARGEST
    texts = value if isinstance(value, list) else [value]
    return isinstance(value, kind) and not is_too_large and not any("\0" in str(text) for text in texts)


def saved_step(folder: Path) -> int | None:
    """The last step that was saved in `folder`; None if there is none."""
    tracker = folder / TRACKER_FILE
    return as_step(tracker.read_text(errors="replace").strip()) if tracker.is_file() else None


def as_step(text: str) -> int | None:
    """The step that a tracker file names with `text`; None if that is no number of a step."""
    return int(text) if text.isdecimal() and len(text) < 19 else None  # int() refuses more than 4,300 digits


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or damaged."""
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
