"""Settings and tasks that the demo shares with the experiments on its base."""

from collections.abc import Mapping
from pathlib import Path

from examples import tasks
from examples.languages import ORIGINAL, held_out_files
from moelpr.base import machine
from moelpr.project.workflow.task import Task

RECIPES = Path("launch/recipes")
NUM_NEW_EXPERTS, TOPK, COPIES = 4, 2, 2
REVIEW_BLEND = {"original": 2, "expanded": 5}  # parts of the text of each language group


def expert_options(copies: int) -> list[str]:
    return f"--num-new-experts {NUM_NEW_EXPERTS} --topk {TOPK} --original-copies {copies}".split()


def train(
    save: Path,
    recipe: str,
    start: Path,
    data: Path,
    blend: Mapping[str, float],
    *options: str,
    made_from: tuple[str, ...],
    files: tuple[Path, ...] = (),
    ranks: int | None = None,
) -> list[Task]:
    """Train a stage with the demo's `recipe` and export the model as `<save>-hf`.

    Args:
        start: Checkpoint folder to start from.
        data: Folder of the demo's corpora.
        blend: Language group -> parts of its text.
        options: More flags of the trainer.
        ranks: By default `num_ranks`.
    """
    environment = {"NPROC_PER_NODE": str(ranks or num_ranks())} | gpus_of_pytorch()
    settings = RECIPES / f"demo-{recipe}.yaml"
    stage = recipe if recipe.startswith("stage") else "dense"
    corpora = [word for group, parts in blend.items() for word in (str(parts), data / f"{group}_text_document")]
    training = Task(
        name=save.name,
        command=tasks.training_words(stage, start, corpora, save, "--recipe", settings, *options),
        made_from=made_from,
        files=(settings, *files),
        environment=environment,
        is_complete=lambda: tasks.is_finished(save),
        continues=save,
    )
    return [training, tasks.export(save)]


def num_ranks() -> int:
    """One if the machine has one GPU, otherwise two: on two GPUs or two CPU cores."""
    return min(_num_gpus(), 2) or 2


def gpus_of_pytorch() -> dict[str, str]:
    """Environment variables that hide GPUs which PyTorch cannot use; that would be an error."""
    return {"CUDA_VISIBLE_DEVICES": ""} if not _num_gpus() and machine.has_gpus() else {}


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0  # with an old driver, it counts them


def evaluate(
    run: Path, command: str, models: Mapping[str, Path], corpus: Path, *options: str, made_from: tuple[str, ...]
) -> Task:
    """Evaluate models (name -> Hugging Face directory) on the held-out text of the demo's corpus."""
    data = held_out_files(corpus)
    options = ("--original-languages", ",".join(ORIGINAL), "--sequence-length", "128", "--context", "32", *options)
    output = run / "evaluation"
    return Task(
        name="evaluate" if command == "text" else f"evaluate-{command}",
        command=tasks.evaluation_words(command, models, data, output, "--device", "cpu", *options),
        made_from=made_from,
        files=tuple(data.values()),
        is_complete=(output / ("results.json" if command == "text" else f"{command}.json")).is_file,
    )
