"""Where a run starts, and its settings from model_spec.json, recipe and command line.

Whatever is wrong with a source is kept as a sentence, and the others are read all the same.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moelpr.arguments.flags import Parser, did_you_mean, split_words
from moelpr.arguments.recipe import as_words, read_recipe
from moelpr.checkpoints import step_folder
from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import RECIPE_FILE, TRACKER_FILE
from moelpr.yaml_files import read_mapping

# Where our default differs from Megatron's: the models this trainer starts from were trained without dropout, and a
# validation pass happens only when it is asked for.
_DEFAULTS = (
    "--attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --eval-interval 1000 --save-interval 500 --log-interval 10"
).split()

# The checkpoints a run may start from.
_STARTS = ("--load", "--save", "--pretrained-checkpoint")

T = TypeVar("T")


@dataclass
class Sources:
    """Everything a run's settings were read from.

    checkpoint: the folder this run starts or resumes from; None: there is none.
    step: the saved step of it that --ckpt-step names; None: the latest.
    spec: its model_spec.json; None: there is none that can be read.
    record: the recipe.yaml of that step, the settings it was trained with; None: no run has (the converter did).
    recipe_is_read: False where the recipe is missing or damaged, so that nothing can be said about what it lacks.
    words: all settings as command-line words.
    shape: the model's shape, Megatron's name → value.
    typed: what recipe and command line set, as Megatron's name → the flag they used.
    draft: the settings, without the wrong words.
    complaints: one sentence for everything that is wrong so far.
    """

    checkpoint: Path | None = None
    step: int | None = None
    spec: ModelSpec | None = None
    record: dict[str, Any] | None = None
    recipe_is_read: bool = True
    words: list[str] = field(default_factory=list)
    shape: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    draft: argparse.Namespace = field(default_factory=argparse.Namespace)
    complaints: list[str] = field(default_factory=list)

    @classmethod
    def gather(cls, argv: list[str], parser: Parser) -> "Sources":
        sources = cls()
        early = _early_arguments(argv)
        recipe = sources._recipe(early.recipe, parser)
        from_recipe = _early_arguments(recipe)
        for name, value in vars(from_recipe).items():
            if getattr(early, name) is None:
                setattr(early, name, value)
        sources.checkpoint = sources._try(lambda: checkpoint_source(early))
        sources._add("", [*_DEFAULTS], parser)
        if (folder := sources.checkpoint) is not None:
            starts_afresh = folder == (early.pretrained_checkpoint and Path(early.pretrained_checkpoint))
            if starts_afresh or early.pretrained_checkpoint is None:
                sources.step = early.ckpt_step  # with --pretrained-checkpoint it speaks of the first start
            sources.record = sources._try(lambda: _read_record(folder, sources.step))
            sources.spec = spec = sources._try(lambda: ModelSpec.read(folder))
            if spec is not None and not sources._add_shape(spec, parser):
                sources.spec = None
        sources._add(f"in the recipe {early.recipe}, ", recipe, parser)
        sources._add("", argv, parser)
        flags = parser.flags()
        for word in [*recipe, *argv]:
            flag = word.split("=", 1)[0]
            if flag in flags:
                sources.typed[flags[flag].dest] = flag
        return sources

    def _add_shape(self, spec: ModelSpec, parser: Parser) -> bool:
        """False where Megatron has no such flag or value: the checks then know no model."""
        words = self._try(lambda: spec_to_flags(spec, parser))
        before = len(self.complaints)
        self._add("in the checkpoint's model_spec.json, ", words or [], parser)
        if words is None or len(self.complaints) > before:
            return False
        dests = [parser.actions_of(name)[0].dest for name in shape_of(spec)]
        self.shape = {dest: getattr(self.draft, dest) for dest in dests}
        return True

    def _add(self, where: str, words: list[str], parser: Parser) -> None:
        self.draft, wrong = parser.parse_tolerantly(words, self.draft, where)
        self.complaints += wrong
        self.words += words

    def _recipe(self, path: str | None, parser: Parser) -> list[str]:
        if path is None:
            return []
        recipe = self._try(lambda: read_recipe(Path(path)))
        if recipe is None:
            self.recipe_is_read = False
            return []
        known = {flag for flag in parser.flags() if flag not in ("--recipe", "--help")}
        for flag in [flag for flag in recipe if flag not in known]:
            del recipe[flag]
            hint = did_you_mean(flag, known) or "see python -m moelpr.pretrain --help"
            self.complaints.append(f"the recipe {path} has the key {flag[2:]}, which is no flag; {hint}")
        return as_words(recipe)

    def _try(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            self.complaints.append(str(error))
            return None


def _early_arguments(words: list[str]) -> argparse.Namespace:
    """The few flags that say where the others come from; wrong words are reported when all flags are parsed."""
    parser = Parser(add_help=False)
    for flag in ("--recipe", *_STARTS):
        parser.add_argument(flag)
    parser.add_argument("--ckpt-step", type=int)
    theirs, _ = split_words(words, parser.flags())
    return parser.parse_tolerantly(theirs)[0]


def checkpoint_source(args: argparse.Namespace) -> Path:
    """The folder this run starts or resumes from."""
    for folder in (args.load or args.save, args.pretrained_checkpoint):
        if folder and (Path(folder) / TRACKER_FILE).exists():
            return Path(folder)
    if args.pretrained_checkpoint is None:
        raise UserError(
            "no checkpoint to start from; name one with --pretrained-checkpoint "
            "(checkpoint_convert/hf_to_mcore.py makes it from a Hugging Face model)"
        )
    raise UserError(
        f"{args.pretrained_checkpoint} holds no Megatron checkpoint ({TRACKER_FILE} is missing); "
        "make one with checkpoint_convert/hf_to_mcore.py or name a folder written by an earlier stage"
    )


def _read_record(folder: Path, step: int | None) -> dict[str, Any] | None:
    """What that step was trained with. Beside the steps lies what the last start was given: it may have saved none."""
    try:
        places = [step_folder(folder, step), folder]
    except UserError:
        places = [folder]  # a step that is gone is another check's complaint
    path = next((place / RECIPE_FILE for place in places if (place / RECIPE_FILE).is_file()), None)
    return None if path is None else read_mapping(path, "record of the run")


def shape_of(spec: ModelSpec) -> dict[str, Any]:
    """The model's shape: Megatron argument -> value."""
    shape = dict(spec.megatron_args)
    if window := shape.get("window_size"):
        shape["window_size"] = ",".join(map(str, window))
    if spec.moe is not None:
        is_moe = [int(spec.is_moe_layer(layer)) for layer in range(shape["num_layers"])]
        shape |= {
            "num_experts": spec.moe.num_new_experts,
            "num_original_experts": spec.moe.num_original_experts,
            "moe_router_topk": spec.moe.topk,
            "moe_ffn_hidden_size": shape["ffn_hidden_size"],
            "moe_layer_freq": str(is_moe).replace(" ", ""),
        }
    return shape


def spec_to_flags(spec: ModelSpec, parser: Parser) -> list[str]:
    """The model's shape as Megatron flags."""
    words: list[str] = []
    for name, value in shape_of(spec).items():
        actions = parser.actions_of(name)
        if not actions:
            raise UserError(
                f"model_spec.json names {name}, which this Megatron has no argument for; convert the model again"
            )
        if value is None or value == actions[0].default:
            continue
        switch = next((action for action in actions if action.nargs == 0 and action.const == value), None)
        if switch is not None:
            words.append(switch.option_strings[0])
        else:
            words += [actions[0].option_strings[0], str(value)]
    return words
