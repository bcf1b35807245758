"""Tasks that the examples have in common: each is a command that a user could paste into a shell."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from moelpr.base.run_folder import FINISHED_FILE
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.model.model_spec import FILE_NAME as SPEC_FILE
from moelpr.project.workflow.task import Task

Words = list[str | Path]

ROOT = Path(__file__).resolve().parent.parent


def preprocess(
    prefix: Path, inputs: Iterable[Path], tokenizer: Path, group: str, *options: str, made_from: tuple[str, ...]
) -> Task:
    """Make the corpus `<prefix>_text_document` of a language group."""
    words: Words = ["data_tools/preprocess_data.py", "--input", *inputs, "--output-prefix", prefix]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    words += ["--append-eod", "--language", group, *options, "--overwrite"]
    is_complete = Path(f"{prefix}_text_document.manifest.json").is_file
    return Task(name=f"preprocess-{prefix.name}", command=words, made_from=made_from, is_complete=is_complete)


def convert(save: Path, hf_path: Path, *options: str, made_from: tuple[str, ...] = (), name: str = "") -> Task:
    """Convert a Hugging Face model to a Megatron checkpoint; `name` is by default that of `save`."""
    words: Words = ["checkpoint_convert/hf_to_mcore.py", "--hf-path", hf_path, "--save", save, *options, "--overwrite"]
    is_complete = (save / SPEC_FILE).is_file
    return Task(name=name or save.name, command=words, made_from=made_from, is_complete=is_complete)


def export(run: Path, name: str = "", *options: str) -> Task:
    """Export the model of a training run as `<run>-hf`, or under another name."""
    save = run.with_name(f"{name or run.name}-hf")
    words: Words = ["checkpoint_convert/mcore_to_hf.py", "--load", run, "--save", save, "--overwrite", *options]
    is_complete = (save / CONFIG_FILE).is_file
    return Task(name=name or f"export-{run.name}", command=words, made_from=(run.name,), is_complete=is_complete)


def training_words(
    stage: str, start: Path, data: Iterable[str | Path], save: Path, *options: str | Path
) -> list[str | Path]:
    """The command of a training run."""
    return [f"launch/{stage}.sh", "--pretrained-checkpoint", start, "--data-path", *data, "--save", save, *options]


def is_finished(run: Path) -> bool:
    """Whether a training run has made its last step."""
    return (run / FINISHED_FILE).is_file()


def evaluation_words(
    command: str, models: Mapping[str, Path], data: Mapping[str, Path], output: Path, *options: str
) -> list[str | Path]:
    """The command that evaluates models on texts."""
    words = [*named("--model", models), *named("--data", data)]
    return ["-m", "moelpr.measure.evaluate", command, *words, *options, "--output", output]


def named(flag: str, paths: Mapping[str, Path]) -> list[str]:
    """The flag NAME=PATH for each path."""
    return [word for name, path in paths.items() for word in (flag, f"{name}={path}")]
