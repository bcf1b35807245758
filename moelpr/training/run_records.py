"""What lies in and beside a run's checkpoints, so that they can be read without the command that made them."""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.training import training as megatron_training

from moelpr import yaml_files
from moelpr.arguments.settings import resolved_settings
from moelpr.checkpoints import step_name
from moelpr.files import atomic_file
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import COMMAND_FILE, HF_FOLDER, RECIPE_FILE, VERSIONS_FILE
from moelpr.versions import installed_versions


@contextmanager
def run_folder(args: argparse.Namespace, spec: ModelSpec, argv: list[str]) -> Iterator[None]:
    """Rank 0 writes to --save: model_spec.json, hf/ (config and tokenizer), recipe.yaml (resolved flags), command.json
    (the command line `argv` as it was given), versions.json.

    In the context every step that is saved gets a recipe.yaml too: a run may be resumed with other settings, and
    killed before it has saved anything that they speak for.
    """
    if args.save is None or int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    save = Path(args.save)
    save.mkdir(parents=True, exist_ok=True)
    source = Path(args.model_source)
    if source.resolve() != save.resolve():  # a resumed run has them, and other ranks may be reading them now
        spec.write(save)
        if (source / HF_FOLDER).is_dir():
            shutil.copytree(source / HF_FOLDER, save / HF_FOLDER, dirs_exist_ok=True)
    record = yaml_files.dump(resolved_settings(args), sort_keys=True)
    _write(save, record)
    with atomic_file(save / VERSIONS_FILE) as temporary:
        temporary.write_text(json.dumps(installed_versions(), indent=2) + "\n")
    with atomic_file(save / COMMAND_FILE) as temporary:
        command = {"arguments": argv, "num_ranks": int(os.environ.get("WORLD_SIZE", "1"))}
        temporary.write_text(json.dumps(command, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    megatrons = megatron_training.save_checkpoint

    def save_checkpoint(iteration: int, *arguments: Any, **settings: Any) -> None:
        megatrons(iteration, *arguments, **settings)
        step = save / step_name(iteration)
        if step.is_dir():  # not so for --non-persistent-save-interval, which saves elsewhere
            _write(step, record)

    megatron_training.save_checkpoint = save_checkpoint
    try:
        yield
    finally:
        megatron_training.save_checkpoint = megatrons


def _write(folder: Path, record: str) -> None:
    with atomic_file(folder / RECIPE_FILE) as temporary:
        temporary.write_text(record)
