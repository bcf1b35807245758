"""A run as its user requests it: the settings that checkpoint, recipe and command line give, and where it starts.

Errors in one source are collected, so that the others are still read. Each source is parsed once.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.base import ranks
from moelpr.base.errors import UserError
from moelpr.base.run_folder import RECIPE_FILE, checkpoint_folder, recorded_settings, saved_step
from moelpr.model.checkpoints.chain import step_folder
from moelpr.model.layers.config import shape_of
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES
from moelpr.plan.layouts import Layout
from moelpr.train.arguments.early import LENGTH_FLAGS
from moelpr.train.arguments.flags import Parser, split_by_flags, suggestion, values_of
from moelpr.train.arguments.recipes import read_recipe, recipe_argv

# Defaults that differ from Megatron's: the supported models were trained without dropout, validation is optional, and
# other modes of --rerun-mode are refused.
_DEFAULTS = (
    "--attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --eval-interval 1000 --save-interval 500 "
    "--log-interval 10 --rerun-mode disabled"
).split()


@dataclass
class RequestedRun:
    """A run's settings and where they come from, before anything is built."""

    # The settings, by Megatron's names, without invalid arguments.
    args: argparse.Namespace = field(default_factory=argparse.Namespace)
    defaults: argparse.Namespace = field(default_factory=argparse.Namespace)  # the same without recipe and command line
    # The settings of recipe and command line: the flag used → Megatron's name.
    given: dict[str, str] = field(default_factory=dict)
    checkpoint: Path | None = None  # the folder that this run starts or resumes from; None if it has none
    step: int | None = None  # the saved step that --ckpt-step selects; None for the latest
    step_folder: Path | None = None  # the folder of that step; None if it is missing
    spec: ModelSpec | None = None  # the checkpoint's model_spec.json; None if it cannot be read
    # The model's shape: Megatron's name → value; empty if `spec` is None.
    shape: dict[str, Any] = field(default_factory=dict)
    # The recipe.yaml of that step, the settings it was trained with; None if no run has trained it.
    record: dict[str, Any] | None = None
    recipe_is_read: bool = True  # False if the recipe cannot be read, so that missing flags may be in it
    problems: list[str] = field(default_factory=list)  # one message per problem with the sources
    world_size: int = 1  # the number of ranks
    saved_step: int | None = None  # the last step in --save when the settings were read; None if it has none

    @classmethod
    def gather(cls, argv: list[str], parser: Parser) -> "RequestedRun":
        """Read all sources; whatever is wrong with them is in `problems`."""
        run = cls(world_size=ranks.world_size())
        path = values_of(argv).get("--recipe")
        recipe = run._recipe(path, parser) if path else []
        if any(item.split("=", 1)[0] in LENGTH_FLAGS for item in argv):  # in another unit than the recipe's
            _, recipe = split_by_flags(recipe, LENGTH_FLAGS)
        run._add("", _DEFAULTS, parser)
        run._locate(values_of([*recipe, *argv]))
        if run.checkpoint is not None:
            run._add_model(run.checkpoint, parser)
        run.defaults = run.args
        run._add(f"in the recipe {path}, ", recipe, parser)
        run._add("", argv, parser)
        flags, words = parser.flags(), (item.split("=", 1)[0] for item in [*recipe, *argv])
        run.given = {word: flags[word].dest for word in words if word in flags}
        return run

    @property
    def explicit_args(self) -> dict[str, str]:
        """The settings of recipe and command line: Megatron's name → the flag used."""
        return {name: flag for flag, name in self.given.items()}

    @property
    def is_moe(self) -> bool:
        """Whether experts are trained: the model has some, and the stage is of such (reported separately)."""
        return self.spec is not None and self.spec.moe is not None and self.args.stage not in DENSE_STAGES

    @property
    def is_resumed(self) -> bool:
        """Whether the checkpoint is this run's own, so that its optimizer state, data position and step are loaded."""
        folders = {Path(folder) for folder in (self.args.load, self.args.save) if folder}
        return self.checkpoint in folders and not self.args.finetune

    @property
    def has_no_optimizer_state(self) -> bool:
        """Whether a resumed run was saved with --no-save-optim; Megatron would fail to load the state."""
        return self.is_resumed and bool((self.record or {}).get("no_save_optim"))

    @property
    def global_batch_size(self) -> int:
        """The number of sequences per step, by default one micro-batch per data-parallel rank, as Megatron has it."""
        return self.args.global_batch_size or (self.args.micro_batch_size or 0) * self.layout.dp

    @property
    def balance_loss_coeff(self) -> float | None:
        """The weight of the balance loss; None without experts."""
        default = 0.01 if self.args.stage == "stage1" else 0.0
        has_experts = self.spec is not None and self.spec.moe is not None
        return default if has_experts and self.args.balance_loss_coeff is None else self.args.balance_loss_coeff

    @property
    def lpr_loss_coeff(self) -> float:
        """The weight of the LPR loss."""
        if self.spec is None or self.spec.moe is None:
            return 0.0
        default = 0.1 if self.args.stage in ("stage2", "sft") else 0.0
        return default if self.args.lpr_loss_coeff is None else float(self.args.lpr_loss_coeff)

    @property
    def save_retain_interval(self) -> int | None:
        """--save-retain-interval, rounded up to a multiple of --save-interval, as Megatron requires."""
        retain, save = self.args.save_retain_interval, self.args.save_interval
        return retain if not retain or not save else -(-retain // save) * save

    @property
    def layout(self) -> Layout:
        """The parallel layout; sizes that are invalid count as 1."""
        virtual_stages = self.args.num_virtual_stages_per_pipeline_rank or 1
        return Layout.from_settings(vars(self.args), self.world_size, virtual_stages)

    def flag(self, name: str) -> str:
        """The flag of an argument, as recipe or command line spell it."""
        return self.explicit_args.get(name, f"--{name.replace('_', '-')}")

    def _locate(self, words: dict[str, str]) -> None:
        """Find the checkpoint, its step and its record, before the flags are parsed, as it has the model's shape."""
        save, pretrained = words.get("--save"), words.get("--pretrained-checkpoint")
        self.saved_step = saved_step(Path(save)) if save else None
        self.checkpoint = self._try(checkpoint_folder, words.get("--load") or save, pretrained)
        if self.checkpoint is None:
            return
        if pretrained is None or self.checkpoint == Path(pretrained):  # else --ckpt-step refers to the latter
            with suppress(ValueError):  # reported when all flags are parsed
                self.step = int(words["--ckpt-step"]) if "--ckpt-step" in words else None
        self.step_folder = self._try(step_folder, self.checkpoint, self.step)
        self.record = self._try(_read_record, self.checkpoint, self.step_folder)

    def _add_model(self, checkpoint: Path, parser: Parser) -> None:
        """Add the model's shape. If Megatron does not accept it, the checks have no model."""
        before = len(self.problems)
        spec = self._try(ModelSpec.read, checkpoint)
        argv = self._try(_shape_flags, spec, parser) if spec is not None else None
        self._add("in the checkpoint's model_spec.json, ", argv or [], parser)
        if spec is not None and len(self.problems) == before:
            names = [parser.actions_of(name)[0].dest for name in shape_of(spec)]
            self.spec, self.shape = spec, {name: getattr(self.args, name) for name in names}

    def _add(self, where: str, argv: list[str], parser: Parser) -> None:
        self.args, problems = parser.parse_tolerantly(argv, self.args, where)
        self.problems += problems

    def _recipe(self, path: str, parser: Parser) -> list[str]:
        recipe = self._try(read_recipe, Path(path))
        if recipe is None:
            self.recipe_is_read = False
            return []
        known = {flag for flag in parser.flags() if flag not in ("--recipe", "--help", "--help-all")}
        for flag in (flag for flag in recipe if flag not in known):
            self.problems.append(f"in the recipe {path}, the key {flag[2:]} is not a flag; {suggestion(flag, known)}")
        return recipe_argv({flag: value for flag, value in recipe.items() if flag in known})

    def _try[T](self, read: Callable[..., T], *args: object) -> T | None:
        try:
            return read(*args)
        except UserError as error:
            self.problems.append(str(error))
            return None


def _read_record(folder: Path, step: Path | None) -> dict[str, Any] | None:
    """The settings a step was trained with; if it has none, those of the last start, which may have saved nothing."""
    paths = (place / RECIPE_FILE for place in (step or folder, folder))
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else recorded_settings(path)


def _shape_flags(spec: ModelSpec, parser: Parser) -> list[str]:
    """The model's shape as command-line arguments."""
    argv: list[str] = []
    for name, value in shape_of(spec).items():
        actions = parser.actions_of(name)
        if not actions:
            raise UserError(f"model_spec.json has {name}, which Megatron does not support; convert the model again")
        if value is None or value == actions[0].default:
            continue
        switch = next((action for action in actions if action.nargs == 0 and action.const == value), None)
        word = ",".join(map(str, value)) if name == "window_size" else str(value).replace(" ", "")
        argv += [switch.option_strings[0]] if switch is not None else [actions[0].option_strings[0], word]
    return argv
