"""Check the flags that a project sets for its steps, against the commands that will get them."""

import os
import re
import subprocess
import sys
from collections.abc import Collection

from moelpr.base.errors import UserError, did_you_mean
from moelpr.project.reading import ProjectFile
from moelpr.project.steps import RECIPES, STEPS
from moelpr.train.arguments.supported import SUPPORTED


def check_flags(file: ProjectFile, tasks: Collection[str]) -> None:
    """Check the flags of the steps that these tasks belong to.

    Raises:
        UserError: A step's command does not have a flag.
    """
    for step, flags in file.project.steps.items():
        if not flags or not any(task == step or task.startswith(f"{step}-") for task in tasks):
            continue
        known, allowed = flags_of(step), flags.get("allow-untested", "")
        known |= {*map(str, allowed if isinstance(allowed, list) else [allowed])}
        for flag in flags:
            if flag not in known:
                hint = did_you_mean(flag, known, f"see moelpr {STEPS[step]} --help")
                raise UserError(f"{file.at('steps', step, flag)}steps.{step}.{flag} is no flag of this step; {hint}")


def flags_of(step: str) -> set[str]:
    """The flags of a step's command, without dashes: by its help, and of Megatron's those that the trainer supports."""
    words = [sys.executable, "-m", "moelpr", *STEPS[step].split(), "--help"]
    found = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "1000"})
    names = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", found.stdout))
    return names | SUPPORTED if step in RECIPES else names
