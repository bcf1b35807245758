"""What lies beside a run's checkpoints, so that they can be read without the command that made them."""

import argparse
import os
import shutil
from pathlib import Path

import yaml

from moelpr.arguments import resolved_settings
from moelpr.files import atomic_file
from moelpr.model_spec import ModelSpec


def prepare(args: argparse.Namespace, spec: ModelSpec) -> None:
    """Rank 0 writes model_spec.json, hf/ (config and tokenizer) and recipe.yaml (resolved flags) into --save."""
    if args.save is None or int(os.environ.get("RANK", "0")) != 0:
        return
    save = Path(args.save)
    save.mkdir(parents=True, exist_ok=True)
    source = Path(args.model_source)
    if source.resolve() != save.resolve():  # a resumed run has them, and other ranks may be reading them now
        spec.write(save)
        if (source / "hf").is_dir():
            shutil.copytree(source / "hf", save / "hf", dirs_exist_ok=True)
    with atomic_file(save / "recipe.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(resolved_settings(args), sort_keys=True))
