"""The steps of a project by name, their flags, and the words of their commands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelpr.project.project import Method
from moelpr.train.arguments.recipes import read_recipe, recipe_argv

# Step → the subcommand that it runs.
STEPS = {
    "vocabulary": "data extend-tokenizer",
    "preprocess": "data preprocess",
    "conversations": "data preprocess",
    "replay": "data sample",
    "convert": "model convert",
    "stage0": "train stage0",
    "stage1": "train stage1",
    "stage2": "train stage2",
    "sft": "train sft",
    "dense": "train dense",
    "ffn": "train ffn",
    "lora": "train lora",
    "export": "model export",
    "calibrate": "model calibrate",
    "graft": "model graft",
    "evaluate": "evaluate text",
    "routing": "evaluate routing",
    "benchmarks": "evaluate harness",
    "card": "model card",
    "report": "report",
    "track": "track",
}
# Method → the step that trains with the budget. The other steps of a method differ, too.
MAIN_STAGE: dict[Method, str] = {"moe-lpr": "stage1", "full": "dense", "ffn": "ffn", "lora": "lora"}
_MOE_LPR_ONLY = frozenset("vocabulary replay conversations stage0 stage1 stage2 sft calibrate graft routing".split())
# A project decides these by itself; every other flag of a step can be set under its name.
OWN_FLAGS = frozenset(
    "input output-prefix tokenizer-type tokenizer-model language original-languages hf-path save load base instruct "
    "model data output extended-tokenizer tokenizer original pretrained-checkpoint data-path resume overwrite "
    "conversations chat-template-from expanded-languages dense export rank alpha modules".split()
)
# They decide how fast a step is, not what it writes: nothing is done again when they change.
SPEED_FLAGS = frozenset(
    "nproc-per-node tensor-model-parallel-size pipeline-model-parallel-size expert-model-parallel-size "
    "expert-tensor-parallel-size sequence-parallel recompute-granularity recompute-method recompute-num-layers "
    "micro-batch-size log-interval save-interval save-retain-interval num-workers overlap-grad-reduce "
    "overlap-param-gather eval-interval workers device batch-size".split()
)
# A user who sets one of these for a stage decides how long it trains.
LENGTH_FLAGS = frozenset(("train-tokens", "train-epochs", "train-iters", "train-samples"))
RECIPES = {"stage0": "paper-stage1", "stage1": "paper-stage1", "stage2": "paper-stage2", "sft": "sft"}
RECIPES |= {"dense": "paper-dense", "ffn": "paper-dense"}

Flags = Mapping[str, Any]


def steps_of(method: Method) -> list[str]:
    """The steps that a project may have, by its method."""
    without = {*MAIN_STAGE.values()} - {MAIN_STAGE[method]}
    if method == "moe-lpr":
        return [step for step in STEPS if step not in without]
    without |= _MOE_LPR_ONLY | ({"convert", "export"} if method == "lora" else set())
    return [step for step in STEPS if step not in without]


def words(step: str, own: Flags, fixed: Flags, *positional: str, repeated: tuple[str, ...] = ()) -> list[str]:
    """The command of a step.

    Args:
        own: The user's flags for the step, which come before `fixed`.
        fixed: Flags that the project decides, without dashes; those without a value are left out.
        positional: Words before the flags.
        repeated: Flags that are given once for each value.
    """
    flags = dict(fixed) | {flag: value for flag, value in own.items() if flag not in SPEED_FLAGS}
    found = ["moelpr", *STEPS[step].split(), *positional]
    for flag, value in flags.items():
        values = value if flag in repeated else [value]
        found += [word for one in values for word in recipe_argv({f"--{flag}": one})]
    return found


def settings(own: Flags) -> list[str]:
    """The user's flags for a step that only decide how fast it is."""
    return recipe_argv({f"--{flag}": value for flag, value in own.items() if flag in SPEED_FLAGS})


def recipe_of(stage: str, own: Flags) -> Path | None:
    """The recipe of a stage, which the user's flags may name; with `recipe: false` it has none, and lora never has."""
    name = own.get("recipe", RECIPES.get(stage))
    return Path(str(name)) if name else None


def stage_flags(stage: str, own: Flags) -> dict[str, Any]:
    """All flags of a stage, without dashes: the user's, and those of its recipe."""
    path = recipe_of(stage, own)
    recipe = read_recipe(path) if path else {}
    return {flag.removeprefix("--"): value for flag, value in recipe.items()} | dict(own)
