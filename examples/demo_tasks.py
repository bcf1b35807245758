"""Tasks of the demo: each is a command that a user could paste into a shell."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from examples.languages import ORIGINAL, held_out_files
from moelpr.base import machine
from moelpr.base.run_folder import FINISHED_FILE
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.model.model_spec import FILE_NAME as SPEC_FILE
from moelpr.project.workflow.task import Task

Words = list[str | Path]

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path("launch/recipes")
NUM_NEW_EXPERTS, TOPK, COPIES = 4, 2, 2


def preprocess(prefix: Path, inputs: Iterable[Path], tokenizer: Path) -> Task:
    """Make the corpus `<prefix>_text_document` of the language group that it is named after."""
    words: Words = ["moelpr", "data", "preprocess", "--input", *inputs, "--output-prefix", prefix]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    words += ["--append-eod", "--language", prefix.name, "--workers", "2", "--overwrite"]
    is_complete = Path(f"{prefix}_text_document.manifest.json").is_file
    made_from = ("corpus", "untrained")
    return Task(name=f"preprocess-{prefix.name}", command=words, made_from=made_from, is_complete=is_complete)


def convert(save: Path, hf_path: Path, *, made_from: tuple[str, ...]) -> Task:
    """Convert a dense Hugging Face model to a Megatron checkpoint."""
    words: Words = ["moelpr", "model", "convert", "--hf-path", hf_path, "--save", save, "--dense", "--overwrite"]
    is_complete = (save / SPEC_FILE).is_file
    return Task(name=f"convert-{save.name}", command=words, made_from=made_from, is_complete=is_complete)


def train(run: Path, name: str, start: Path, blend: Mapping[str, float]) -> list[Task]:
    """Train a dense model with the demo's recipe of this name, and export it as `<name>-hf`.

    Args:
        start: Checkpoint folder to start from, made by `convert`.
        blend: Language group -> parts of its text.
    """
    save, recipe = run / name, RECIPES / f"demo-{name}.yaml"
    words: Words = ["launch/dense.sh", "--pretrained-checkpoint", start, "--data-path"]
    words += [word for group, parts in blend.items() for word in (str(parts), run / "data" / f"{group}_text_document")]
    training = Task(
        name=name,
        command=[*words, "--save", save, "--recipe", recipe],
        made_from=(f"convert-{start.name}", *(f"preprocess-{group}" for group in blend)),
        files=(recipe,),
        environment={"NPROC_PER_NODE": str(num_ranks())} | gpus_of_pytorch(),
        is_complete=(save / FINISHED_FILE).is_file,
        continues=save,
    )
    return [training, export(save)]


def export(run: Path) -> Task:
    """Export the model of a training run as `<run>-hf`."""
    save = run.with_name(f"{run.name}-hf")
    words: Words = ["moelpr", "model", "export", "--load", run, "--save", save, "--overwrite"]
    is_complete = (save / CONFIG_FILE).is_file
    return Task(name=f"export-{run.name}", command=words, made_from=(run.name,), is_complete=is_complete)


def num_ranks() -> int:
    """One if the machine has one GPU, otherwise two: on two GPUs or two CPU cores."""
    return min(_num_gpus(), 2) or 2


def gpus_of_pytorch() -> dict[str, str]:
    """Environment variables that hide GPUs which PyTorch cannot use; that would be an error."""
    return {"CUDA_VISIBLE_DEVICES": ""} if not _num_gpus() and machine.has_gpus() else {}


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0  # with an old driver, it counts them


def evaluate(run: Path, command: str, models: Mapping[str, str], *options: str) -> Task:
    """Evaluate the exports of models (name -> run folder) on the held-out text of the demo's corpus."""
    data, output = held_out_files(run / "corpus"), run / "evaluation"
    exports = {model: run / f"{folder}-hf" for model, folder in models.items()}
    words: Words = ["moelpr", "evaluate", command]
    for flag, paths in (("--model", exports), ("--data", data)):
        words += [word for name, path in paths.items() for word in (flag, f"{name}={path}")]
    words += ["--device", "cpu", "--original-languages", ",".join(ORIGINAL)]
    words += ["--sequence-length", "128", "--context", "32", *options, "--output", output]
    return Task(
        name="evaluate" if command == "text" else f"evaluate-{command}",
        command=words,
        made_from=("corpus", *(f"export-{folder}" for folder in models.values())),
        files=tuple(data.values()),
        is_complete=(output / ("results.json" if command == "text" else f"{command}.json")).is_file,
    )
