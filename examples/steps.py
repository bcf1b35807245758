"""Steps of the demo and of experiments on its base: commands that are printed, logged, and skipped once done."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from moelpr.process import machine
from moelpr.process.errors import MachineError, UserError
from moelpr.store.files import make_folder, write_text
from moelpr.store.run_folder import FINISHED_FILE, read_json

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path("launch/recipes")
ORIGINAL, EXPANDED = ("en", "es", "zh"), ("el", "hu", "tr")
NUM_NEW_EXPERTS, TOPK, COPIES = 4, 2, 2
REVIEW_BLEND = {"original": 2, "expanded": 5}  # parts of the text of each language group


class Steps:
    """A run folder and the steps that are done in it; several threads may run steps.

    A step that is done has a mark, `logs/NAME.json`: its command, its time, the IDs of the outputs and the SHA-256 of
    the files that it was made from, and an ID of its own, the hash of all but the time. If one of these differs, the
    step is done again.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.logs = run, run / "logs"
        self._started = time.monotonic()
        self._printing = threading.Lock()

    def step(
        self,
        name: str,
        *command: str | Path,
        made_from: Iterable[str] = (),
        files: Iterable[Path] = (),
        is_complete: Callable[[], bool] = lambda: True,
        continues: Path | None = None,
        again: bool = False,
        **variables: str,
    ) -> None:
        """Run a launcher, or Python with these arguments, unless this command is done.

        Args:
            made_from: Steps whose output it reads.
            files: Other files and folders that it reads; their content counts.
            is_complete: Whether its output is there. A command may end early with exit code 0, as the trainer does
                when it is asked to stop.
            continues: Folder in which the command continues what it finds, whatever made it.
            again: Restore the output of a step that is done.
            variables: Of its environment.

        Raises:
            MachineError: the command ended with exit code 1, for instance because the disk is full.
            UserError: it failed otherwise, did not write its output, or would continue another command's.
        """
        mark, log = self.logs / f"{name}.json", self.logs / f"{name}.log"
        is_current = self.is_current(name, command, made_from, files)
        if is_current and not again:
            self._print(f"{name}: already done")
            return
        before = read_json(mark) or {}
        if before and not is_current and continues and continues.exists():
            raise UserError(
                f"{continues} was made by another command, or from other files, than step {name} would now use; remove "
                "it to make it again, or use another folder"
            )
        make_folder(self.logs)
        mark.unlink(missing_ok=True)  # if this command fails, another one's output is no longer there
        words, what = [str(word) for word in command], _shown(command)
        python = [] if words[0].endswith(".sh") else [sys.executable]
        settings = [f"{key}={value}" for key, value in variables.items()]
        shown = " ".join([*settings, *map(_relative, python), what])
        self._print(f"{name}\n    {shown} >>{log}")
        start = time.monotonic()
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", **variables}
        with open(log, "a") as file:
            file.write(f"$ {shown}\n")
            file.flush()
            code = subprocess.run([*python, *words], stdout=file, env=environment).returncode
        if code != 0:
            kind = MachineError if code == 1 else UserError
            raise kind(f"step {name} exited with code {code} and the message above; its output is in {log}")
        if not is_complete():
            raise UserError(f"step {name} was stopped before its end (its output is in {log}); run it again to resume")
        of = {"command": what, **self._made_from(made_from, files)}
        name_of_output = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
        done = {**of, "id": name_of_output, "wall_s": round(time.monotonic() - start, 1)}
        write_text(mark, json.dumps(done) + "\n")

    def is_current(
        self, name: str, command: Iterable[str | Path], made_from: Iterable[str] = (), files: Iterable[Path] = ()
    ) -> bool:
        """Whether the step is done, by this command and from what these other steps have made last."""
        mark = read_json(self.logs / f"{name}.json") or {}
        return {"command": _shown(command), **self._made_from(made_from, files)}.items() <= mark.items()

    def is_done(self, name: str) -> bool:
        return name in self.wall_times_s()

    def wall_times_s(self) -> dict[str, float]:
        """Seconds of each step that is done, in the order in which they ended."""
        marks = sorted(self.logs.glob("*.json"), key=lambda path: path.stat().st_mtime)
        found = {path.stem: (read_json(path) or {}).get("wall_s") for path in marks}
        return {name: wall for name, wall in found.items() if isinstance(wall, int | float)}

    def _made_from(self, steps: Iterable[str], files: Iterable[Path]) -> dict[str, dict[str, Any]]:
        checksums = {_relative(str(path)): _sha256(path) for path in files}
        return {"made_from": {name: self._id(name) for name in steps}, "files": checksums}

    def _id(self, name: str) -> Any:
        return (read_json(self.logs / f"{name}.json") or {}).get("id")

    def _print(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        with self._printing:
            print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


def _shown(command: Iterable[str | Path]) -> str:
    return shlex.join(_relative(str(word)) for word in command)


def _relative(word: str) -> str:
    return word.removeprefix(f"{ROOT}/")


def _sha256(path: Path) -> str:
    """The checksum of a file, or of the names and contents of all files in a folder; "" if it is missing."""
    if path.is_file():
        return _sha256_of_file(path, path.stat().st_mtime_ns)
    found = [(str(file.relative_to(path)), _sha256(file)) for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else ""


@cache
def _sha256_of_file(path: Path, _: int) -> str:
    """Several steps may read a file; the second argument is its time of modification."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(
    steps: Steps, name: str, hf_path: Path, save: Path, *options: str, made_from: Iterable[str] = (),
    files: Iterable[Path] = (),
) -> None:  # fmt: skip
    """Convert a Hugging Face model to a Megatron checkpoint."""
    words = ("--hf-path", hf_path, "--save", save, *options, "--overwrite")
    steps.step(name, "checkpoint_convert/hf_to_mcore.py", *words, made_from=made_from, files=files)


def train(
    steps: Steps, name: str, stage: str, start: Path, data: Path, blend: Mapping[str, float],
    *options: str, made_from: Iterable[str], files: Iterable[Path] = (), recipe: str = "", ranks: int | None = None,
) -> None:  # fmt: skip
    """Train a stage and export the model as `<run>/<name>-hf`.

    Args:
        start: Checkpoint folder to start from.
        data: Folder of the demo's corpora.
        blend: Language group -> parts of its text.
        options: More flags of the trainer.
        made_from, files: The steps that made start and data, and the files if they come from elsewhere.
        recipe: Name of the demo's recipe; by default `name`.
        ranks: By default one if the machine has one GPU, otherwise two: on two GPUs or two CPU cores.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # with an old driver, it counts them
    settings = RECIPES / f"demo-{recipe or name}.yaml"
    steps.step(
        name,
        *(f"launch/{stage}.sh", "--recipe", settings, "--pretrained-checkpoint", start),
        *("--data-path", *(word for group in blend for word in (str(blend[group]), data / f"{group}_text_document"))),
        *("--save", steps.run / name, *options),
        NPROC_PER_NODE=str(ranks or min(gpus, 2) or 2),
        made_from=made_from,
        files=[settings, *files],
        is_complete=(steps.run / name / FINISHED_FILE).is_file,
        continues=steps.run / name,
        # GPUs that PyTorch cannot use would be an error.
        **({"CUDA_VISIBLE_DEVICES": ""} if not gpus and machine.has_gpus() else {}),
    )
    words = ("--load", steps.run / name, "--save", steps.run / f"{name}-hf", "--overwrite")
    steps.step(f"export-{name}", "checkpoint_convert/mcore_to_hf.py", *words, made_from=[name])


def held_out_files(demo: Path) -> dict[str, Path]:
    """Language -> held-out text of the demo in folder `demo`."""
    return {name: demo / "corpus" / f"validation.{name}.jsonl" for name in (*ORIGINAL, *EXPANDED)}


def evaluate(
    steps: Steps, name: str, command: str, models: Mapping[str, Path], demo: Path, options: Iterable[str] = (), *,
    made_from: Iterable[str], files: Iterable[Path] = (),
) -> None:  # fmt: skip
    """Evaluate models (name -> Hugging Face directory) on the held-out text of the demo in folder `demo`."""
    words = [word for model, folder in models.items() for word in ("--model", f"{model}={folder}")]
    words += [word for language, path in held_out_files(demo).items() for word in ("--data", f"{language}={path}")]
    words += ["--original-languages", ",".join(ORIGINAL), "--sequence-length", "128", "--context", "32"]
    words += ["--device", "cpu", "--output", str(steps.run / "evaluation")]
    steps.step(
        name,
        *("-m", "moelpr.evaluate", command, *words, *options),
        made_from=made_from,
        files=[*held_out_files(demo).values(), *files],
    )
