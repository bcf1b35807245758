"""Files next to a run's checkpoints, so that they can be read without the command that made them."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager

from moelpr.base import ranks, yaml_files
from moelpr.base.files import copy_part, make_folder, write_text
from moelpr.base.run_folder import HF_FOLDER, RECIPE_FILE, VERSIONS_FILE, Command
from moelpr.base.versions import installed_versions
from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.megatron import hooks
from moelpr.train.arguments.requirements import resolved_settings
from moelpr.train.arguments.settings import RunSettings


@contextmanager
def run_records(settings: RunSettings, args: argparse.Namespace, argv: list[str]) -> Iterator[None]:
    """Rank 0 writes to --save: model_spec.json, hf/, recipe.yaml, command.json and versions.json.

    While the context is open, every saved step gets a recipe.yaml too: a run may be resumed with other settings, and
    killed before it has saved anything under them.
    """
    if settings.save is None or not ranks.is_first_rank():
        yield
        return
    save, source = settings.save, settings.start.checkpoint
    make_folder(save)
    if source.resolve() != save.resolve():  # a resumed run has them, and other ranks may be reading them now
        settings.spec.write(save)
        if (source / HF_FOLDER).is_dir():
            copy_part(source / HF_FOLDER, "", save / HF_FOLDER)
            Lineage.of(settings.start.step_folder).write(save / HF_FOLDER)
    recipe = yaml_files.dump(resolved_settings(vars(args)), sort_keys=True)
    write_text(save / RECIPE_FILE, recipe)
    write_text(save / VERSIONS_FILE, json.dumps(installed_versions(), indent=2) + "\n")
    Command(argv, ranks.world_size(), ranks.local_world_size()).write(save)
    with hooks.after_step_is_written(lambda step, _: write_text(step / RECIPE_FILE, recipe)):
        yield
