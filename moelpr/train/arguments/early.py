"""The checks of a run's flags that need neither torch nor Megatron: what is missing, and wrong values."""

from argparse import ArgumentError, ArgumentParser, _AppendAction
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.run_folder import checkpoint_folder
from moelpr.data.mixing import blend
from moelpr.train.arguments.flags import split_by_flags, supported_arguments, values_of
from moelpr.train.arguments.recipes import read_recipe, recipe_argv

# How long a run is, in one of three units. Those of the command line take the place of the recipe's.
LENGTH_FLAGS = ("--train-iters", "--train-tokens", "--train-epochs")
LENGTHS = tuple(flag[2:].replace("-", "_") for flag in LENGTH_FLAGS)
# The flag to pass if none of the arguments is given.
_REQUIRED = {
    "--stage stage1 (or stage0, stage2, sft, dense, ffn)": ("stage",),
    "--micro-batch-size SEQUENCES": ("micro_batch_size",),
    "--seq-length TOKENS": ("seq_length",),
    "--lr RATE": ("lr",),
    "--train-iters STEPS (or --train-tokens N, --train-epochs E)": LENGTHS,
    "--data-path PREFIX (moelpr data preprocess makes a corpus)": ("data_path", "mock_data"),
}


def missing(given: Collection[str]) -> Iterator[str]:
    """A message for each flag without a default that is not given; `given` are Megatron's names."""
    for usage, names in _REQUIRED.items():
        if not any(name in given for name in names):
            yield f"{usage.split()[0]} is required; pass {usage}"


def check_start(stage: str, argv: list[str], *, needs_checkpoint: bool = True) -> None:
    """Check that a stage's command line has what the trainer requires, and a checkpoint to start from.

    Raises:
        UserError: A flag, the recipe, the checkpoint or a corpus is missing, or a flag has a wrong value.
    """
    if "--help-all" in argv:
        return
    recipe, parser = values_of(argv).get("--recipe"), supported_arguments()
    own = ["--stage", stage, *argv]
    words = [*(recipe_argv(read_recipe(Path(recipe))) if recipe else []), *own]
    values = values_of(words)
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    problems = [*missing({flag[2:].replace("-", "_") for flag in flags})]
    problems += parser.parse_tolerantly(split_by_flags(own, parser.flags())[0])[1]
    if needs_checkpoint:
        problems += _missing_corpora(words)
        try:
            checkpoint_folder(values.get("--load") or values.get("--save"), values.get("--pretrained-checkpoint"))
        except UserError as error:
            problems.insert(0, str(error))
    if problems:
        several = [f"{len(problems)} settings are wrong:"] if len(problems) > 1 else []
        raise UserError("\n- ".join([*several, *problems]))


def _missing_corpora(argv: list[str]) -> Iterator[str]:
    """A message for each corpus of the last --data-path that is not there."""
    words: list[str] = []
    for word in split_by_flags(argv, ["--data-path"])[0]:
        words = [*filter(None, [word.partition("=")[2]])] if word.startswith("--") else [*words, word]
    with suppress(UserError):  # the trainer reports it
        for prefix in blend(words)[0]:
            if not all(Path(f"{prefix}.{suffix}").exists() for suffix in ("bin", "idx")):
                yield missing_corpus(prefix)


def missing_corpus(prefix: str) -> str:
    return f"{prefix}.bin or {prefix}.idx is missing; make the corpus with moelpr data preprocess"


def wrong_value(parser: ArgumentParser, flag: str, value: Any) -> str:
    """Why a recipe's value is none of a flag, without dashes; empty if it is one, or the parser lacks the flag."""
    action = parser._option_string_actions.get(f"--{flag}")
    words = recipe_argv({f"--{flag}": value})[1:]
    if action is None or value is None or value is False:
        return ""
    try:
        if action.nargs == 0 and words:
            raise ArgumentError(action, f"must be true or false, got {value}")
        for part in [[word] for word in words] if isinstance(action, _AppendAction) and words else [words]:
            if parser._match_argument(action, "A" * len(part)) < len(part):
                raise ArgumentError(action, f"must be one value, got {value}")
            parser._get_values(action, part)
    except ArgumentError as error:
        return error.message
    return ""
