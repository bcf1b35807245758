"""The files of a run folder (`--save`) and of a checkpoint folder, and their readers.

model_spec.json                     the model's family, shape and experts (moelpr.model.model_spec)
hf/                                 configuration and tokenizer of the Hugging Face model it came from
latest_checkpointed_iteration.txt   the last saved step (Megatron's tracker file)
iter_0000500/, release/             one saved step each (moelpr.model.checkpoints.chain)
base_checkpoint.json                where the frozen tensors are, if only trained tensors were saved
recipe.yaml                         every flag with its final value; also inside each saved step
command.json, versions.json         command line and package versions of the last start
best_step.json                      the saved step with the best held-out loss, if that decides (--early-stop-patience)
metrics.jsonl                       one line per step, validation pass or warning (moelpr.model.metrics.run_metrics)
STOP, FINISHED                      asks the run to stop; marks a run that has made all its steps
FAILURES                            failed starts of a Slurm job (launch/slurm/stage.sbatch)
.lock                               locked while a run writes to the folder (moelpr.train.run_lock)
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypedDict

from pydantic import ConfigDict, Field, with_config
from pydantic.dataclasses import dataclass

from moelpr.base import records, yaml_files
from moelpr.base.errors import UserError
from moelpr.base.records import STRICT, Record

HF_FOLDER = "hf"
# Tables of contents of a saved step, next to its .distcp files. Megatron writes the second when the step is complete.
METADATA_FILE, MEGATRON_CONFIG_FILE = TABLE_FILES = ".metadata", "metadata.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
BASE_CHECKPOINT_FILE = "base_checkpoint.json"
RECIPE_FILE = "recipe.yaml"
COMMAND_FILE = "command.json"
VERSIONS_FILE = "versions.json"
METRICS_FILE = "metrics.jsonl"
STOP_FILE = "STOP"
FINISHED_FILE = "FINISHED"

_Name = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # may name a file
_Count = Annotated[int, Field(ge=-(10**12), le=10**12)]  # steps, samples and ranks are fewer


@with_config(ConfigDict(strict=True, extra="allow"))
class Settings(TypedDict, total=False):
    """Every flag of a run with its final value, as recipe.yaml records it.

    These are the flags that others than the trainer use.
    """

    stage: str
    pretrained_checkpoint: _Name | None
    world_size: _Count | None
    train_iters: _Count | None
    virtual_pipeline_model_parallel_size: _Count | None
    data_path: list[_Name | float] | _Name | None


@dataclass(frozen=True, config=STRICT)
class Command(Record):
    """How a run was last started.

    Attributes:
        arguments: The command line, without the program.
        num_ranks: Number of processes.
        ranks_per_node: Number of processes on each node.
    """

    FILE_NAME: ClassVar[str] = COMMAND_FILE
    ASCII: ClassVar[bool] = False

    arguments: list[str]
    num_ranks: int | None = None
    ranks_per_node: int | None = None


@dataclass(frozen=True, config=STRICT)
class BestStep(Record):
    """How a run with --early-stop-patience ended.

    Attributes:
        step: The saved step with the lowest loss on held-out text, which is the run's result.
        loss: This loss in nats per token, of languages weighted as in training.
        made: The steps that were trained.
        planned: The steps that were asked for.
    """

    FILE_NAME: ClassVar[str] = "best_step.json"

    step: int
    loss: float
    made: int
    planned: int


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in `folder`/recipe.yaml; None if the file is missing or damaged."""
    with suppress(UserError):
        return recorded_settings(folder / RECIPE_FILE)
    return None


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings in a recipe.yaml that a run wrote."""
    content = yaml_files.read_mapping(path, "run's recipe")
    settings: dict[str, Any] = dict(
        records.validate(Settings, content, f"the run's recipe {path}", "restore it, or use another step")
    )
    return {name: settings[name] for name in content if name in settings}  # in the order of the file


def read_command(folder: Path) -> Command:
    """How the run in a folder was last started; without arguments if that is not recorded."""
    with suppress(UserError):
        return Command.read(folder)
    return Command([])


def read_versions(folder: Path) -> dict[str, str]:
    """Package → version at the last start of the run in a folder; empty if that is not recorded."""
    with suppress(UserError):
        return records.read(dict[str, str], folder / VERSIONS_FILE, "restore it")
    return {}


def saved_step(folder: Path) -> int | None:
    """The number of the last step that was saved in `folder`; None if it has no such step."""
    tracker = folder / TRACKER_FILE
    return as_step(tracker.read_text(errors="replace").strip()) if tracker.is_file() else None


def checkpoint_folder(own: str | None, pretrained: str | None) -> Path:
    """The folder that a run starts or resumes from: its own, if it contains a checkpoint."""
    for folder in (own, pretrained):
        if folder and (Path(folder) / TRACKER_FILE).exists():
            return Path(folder)
    if pretrained is None:
        raise UserError("a checkpoint is required; pass --pretrained-checkpoint DIR (moelpr model convert makes one)")
    raise UserError(
        f"--pretrained-checkpoint {pretrained} is not a Megatron checkpoint: {TRACKER_FILE} is missing; make one with "
        "moelpr model convert, or pass the --save folder of an earlier stage"
    )


def as_step(text: str) -> int | None:
    """The number of the step that a tracker file names; None if the text is not a step number."""
    return int(text) if text.isdecimal() and len(text) < 19 else None  # int() refuses more than 4,300 digits


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or damaged."""
    with suppress(UserError):
        return records.read(dict[str, Any], path, "")
    return None
