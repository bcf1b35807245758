"""Steps of the demo and of experiments on its base: commands that are printed, logged, and skipped once done."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from moelpr import machine
from moelpr.errors import UserError
from moelpr.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path("launch/recipes")
ORIGINAL, EXPANDED = ("en", "es", "zh"), ("el", "hu", "tr")
NUM_NEW_EXPERTS, TOPK, COPIES = 4, 2, 2
REVIEW_BLEND = {"original": 2, "expanded": 5}  # parts of the text of each language group


class Steps:
    """A run folder and the steps that are done in it; several threads may run steps."""

    def __init__(self, run: Path) -> None:
        self.run, self.logs = run, run / "logs"
        self._started = time.monotonic()
        self._printing = threading.Lock()
        self.logs.mkdir(parents=True, exist_ok=True)

    def step(self, name: str, *command: str | Path, **variables: str) -> None:
        """Run a launcher, or Python with these arguments, unless this command is done; UserError if it fails.

        `variables` are environment variables.
        """
        mark, log = self.logs / f"{name}.json", self.logs / f"{name}.log"
        words = [str(word) for word in command]
        words = words if words[0].endswith(".sh") else [sys.executable, *words]
        settings = "".join(f"{key}={value} " for key, value in variables.items())
        shown = settings + shlex.join(word.removeprefix(f"{ROOT}/") for word in words) + f" >{log}"
        if mark.exists() and json.loads(mark.read_text())["command"] == shown:
            self._print(f"{name}: already done")
            return
        mark.unlink(missing_ok=True)  # if this command fails, another one's output is no longer there
        self._print(f"{name}\n    {shown}")
        start = time.monotonic()
        quiet = {"PYTHONWARNINGS": "ignore"}
        with open(log, "w") as file:
            code = subprocess.run(words, stdout=file, env={**os.environ, **quiet, **variables}).returncode
        if code != 0:
            tail = "".join(f"\n    {line}" for line in log.read_text().splitlines()[-5:])
            raise UserError(f"step {name} exited with code {code}; its output is in {log}{tail}")
        write_text(mark, json.dumps({"command": shown, "wall_s": round(time.monotonic() - start, 1)}) + "\n")

    def wall_times_s(self) -> dict[str, float]:
        """Seconds of each step that is done, in the order in which they ended."""
        marks = sorted(self.logs.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: json.loads(path.read_text())["wall_s"] for path in marks}

    def _print(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        with self._printing:
            print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


def convert(steps: Steps, name: str, hf_path: Path, save: Path, *options: str) -> None:
    """Convert a Hugging Face model to a Megatron checkpoint."""
    words = ("--hf-path", hf_path, "--save", save, *options, "--overwrite")
    steps.step(name, "checkpoint_convert/hf_to_mcore.py", *words)


def train(
    steps: Steps, name: str, stage: str, start: Path, data: Path, blend: Mapping[str, float],
    *options: str, recipe: str = "", ranks: int | None = None,
) -> None:  # fmt: skip
    """Train a stage and export the model as `<run>/<name>-hf`.

    Args:
        start: Checkpoint folder to start from.
        data: Folder of the demo's corpora.
        blend: Language group -> parts of its text.
        options: More flags of the trainer.
        recipe: Name of the demo's recipe; by default `name`.
        ranks: By default one if the machine has one GPU, otherwise two: on two GPUs or two CPU cores.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # with an old driver, it counts them
    steps.step(
        name,
        *(f"launch/{stage}.sh", "--recipe", RECIPES / f"demo-{recipe or name}.yaml", "--pretrained-checkpoint", start),
        *("--data-path", *(word for group in blend for word in (str(blend[group]), data / f"{group}_text_document"))),
        *("--save", steps.run / name, *options),
        NPROC_PER_NODE=str(ranks or min(gpus, 2) or 2),
        # GPUs that PyTorch cannot use would be an error.
        **({"CUDA_VISIBLE_DEVICES": ""} if not gpus and machine.has_gpus() else {}),
    )
    words = ("--load", steps.run / name, "--save", steps.run / f"{name}-hf", "--overwrite")
    steps.step(f"export-{name}", "checkpoint_convert/mcore_to_hf.py", *words)


def held_out_files(demo: Path) -> dict[str, Path]:
    """Language -> held-out text of the demo in folder `demo`."""
    return {name: demo / "corpus" / f"validation.{name}.jsonl" for name in (*ORIGINAL, *EXPANDED)}


def evaluate(
    steps: Steps, name: str, command: str, models: Mapping[str, Path], demo: Path, options: Iterable[str] = ()
) -> None:
    """Evaluate models (name -> Hugging Face directory) on the held-out text of the demo in folder `demo`."""
    words = [word for model, folder in models.items() for word in ("--model", f"{model}={folder}")]
    words += [word for language, path in held_out_files(demo).items() for word in ("--data", f"{language}={path}")]
    words += ["--original-languages", ",".join(ORIGINAL), "--sequence-length", "128", "--context", "32"]
    words += ["--device", "cpu", "--output", str(steps.run / "evaluation")]
    steps.step(name, "-m", "moelpr.evaluate", command, *words, *options)
