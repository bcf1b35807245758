"""A run's settings: read from checkpoint, recipe and command line, completed by machine and method.

Errors in one source are collected, so that the others are still read.
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moelpr.arguments.flags import Parser, split_by_flags, suggestion
from moelpr.arguments.kernels import choose_kernels, is_installed
from moelpr.checkpoints.chain import step_folder
from moelpr.layouts import Layout
from moelpr.megatron_patches import cpu
from moelpr.model.losses import megatron_balance_coeff
from moelpr.model_spec import ModelSpec
from moelpr.process import ranks
from moelpr.process.errors import UserError
from moelpr.store.run_folder import RECIPE_FILE, TRACKER_FILE, saved_step, usable
from moelpr.store.yaml_files import read_mapping

# Defaults that differ from Megatron's: the supported models were trained without dropout, and validation is optional.
# For --rerun-mode see checks/model.py.
_DEFAULTS = (
    "--attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --eval-interval 1000 --save-interval 500 "
    "--log-interval 10 --rerun-mode disabled"
).split()

# Megatron settings that would change the method or be ignored by our layer, with the only value that works. Some of
# Megatron's defaults differ: only explicit arguments are checked (checks/model.py).
FIXED_FOR_MOE: dict[str, Any] = {
    "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "aux_loss",
    "moe_router_score_function": "softmax", "moe_router_pre_softmax": False, "moe_router_topk_scaling_factor": None,
    "moe_expert_capacity_factor": None, "moe_shared_expert_intermediate_size": None,
    "moe_router_enable_expert_bias": False, "moe_router_num_groups": None, "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None, "moe_latent_size": None, "cuda_graph_impl": "none",
    "overlap_moe_expert_parallel_comm": False, "fp8": None, "fp4": None, "mlp_chunks_for_training": 1,
    "use_te_activation_func": False, "overlap_dispatch_backward_with_experts_wgrad": False,
    "moe_mlp_glu_interleave_size": None, "qk_clip": False, "te_precision_config_file": None,
}  # fmt: skip


@dataclass
class RunSettings:
    """A run's settings and where they come from, before anything is built.

    Attributes:
        args: the settings, without invalid arguments and without what the method sets.
        argv: all settings as command-line arguments.
        explicit_args: what recipe and command line set: Megatron's name → the flag used.
        checkpoint: folder this run starts or resumes from; None if there is none.
        step: the saved step that --ckpt-step selects; None for the latest.
        spec: the checkpoint's model_spec.json; None if it cannot be read.
        shape: the model's shape: Megatron's name → value; empty if `spec` is None.
        record: recipe.yaml of that step, the settings it was trained with; None if no run has trained it.
        recipe_is_read: False if the recipe cannot be read, so that missing flags may be in it.
        problems: one message per problem with the sources.
        world_size: number of ranks.
        saved_step: the last step in --save when the settings were read; None if there is none.
    """

    args: argparse.Namespace = field(default_factory=argparse.Namespace)
    argv: list[str] = field(default_factory=list)
    explicit_args: dict[str, str] = field(default_factory=dict)
    checkpoint: Path | None = None
    step: int | None = None
    spec: ModelSpec | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    recipe_is_read: bool = True
    problems: list[str] = field(default_factory=list)
    world_size: int = 1
    saved_step: int | None = None

    @classmethod
    def gather(cls, argv: list[str], parser: Parser) -> "RunSettings":
        """Read all sources; whatever is wrong with them is in `problems`."""
        run = cls(world_size=ranks.world_size())
        recipe = run._recipe(_early_arguments(argv).recipe, parser)
        early = _early_arguments([*recipe, *argv])
        run.saved_step = saved_step(Path(early.save)) if early.save else None
        run.checkpoint = run._try(_checkpoint_folder, early)
        run._add("", [*_DEFAULTS], parser)
        if run.checkpoint is not None:
            start = early.pretrained_checkpoint
            if start is None or run.checkpoint == Path(start):  # else --ckpt-step refers to --pretrained-checkpoint
                run.step = early.ckpt_step
            step = run._try(step_folder, run.checkpoint, run.step)
            run.record = run._try(_read_record, run.checkpoint, step)
            run._add_model(run.checkpoint, parser)
        run._add(f"in the recipe {early.recipe}, ", recipe, parser)
        run._add("", argv, parser)
        flags, given = parser.flags(), (item.split("=", 1)[0] for item in [*recipe, *argv])
        run.explicit_args = {flags[flag].dest: flag for flag in given if flag in flags}
        return run

    @property
    def is_moe(self) -> bool:
        """Whether experts are trained: the model has some, and the stage is not `dense` (reported separately)."""
        return self.spec is not None and self.spec.moe is not None and self.args.stage != "dense"

    @property
    def is_resumed(self) -> bool:
        """Whether the checkpoint is this run's own, so that its optimizer state, data position and step are loaded."""
        own = {Path(folder) for folder in (self.args.load, self.args.save) if folder}
        return self.checkpoint in own and not self.args.finetune

    @property
    def has_no_optimizer_state(self) -> bool:
        """Whether a resumed run was saved with --no-save-optim; Megatron would fail to load the state."""
        return self.is_resumed and bool((self.record or {}).get("no_save_optim"))

    def describe_start(self, args: argparse.Namespace) -> None:
        """Write to `args` where the run starts or resumes."""
        args.model_source, args.ckpt_step, args.is_resumed = str(self.checkpoint), self.step, self.is_resumed
        args.no_load_optim = args.no_load_optim or self.has_no_optimizer_state
        assert self.checkpoint is not None, "a run without a checkpoint is a problem"
        args.model_step = step_folder(self.checkpoint, self.step).name  # recorded: the checkpoint may get further steps

    @property
    def layout(self) -> Layout:
        """The parallel layout; sizes that are invalid count as 1."""
        return Layout.from_settings(vars(self.args), self.world_size, self._virtual_stages() or 1)

    def _virtual_stages(self) -> int | None:
        """Per pipeline rank, as Megatron's validate_args derives them."""
        args, stages = self.args, max(1, self.args.pipeline_model_parallel_size)
        if args.pipeline_model_parallel_layout is not None:
            from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

            with suppress(Exception):  # Megatron reports what it cannot read
                return (
                    PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout) // stages
                )
        if args.num_virtual_stages_per_pipeline_rank is not None:
            return args.num_virtual_stages_per_pipeline_rank
        if (per_stage := args.num_layers_per_virtual_pipeline_stage) is None or per_stage < 1:
            return None
        layers = self.shape.get("num_layers", 1)
        layers += args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        return layers // stages // per_stage

    def flag(self, name: str) -> str:
        """The flag of an argument, as recipe or command line spell it."""
        return self.explicit_args.get(name, f"--{name.replace('_', '-')}")

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
        self.argv += argv

    def _recipe(self, path: str | None, parser: Parser) -> list[str]:
        if path is None:
            return []
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


def _early_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse first the flags that locate the other settings; problems are reported when all flags are parsed."""
    parser = Parser(add_help=False)
    for flag in ("--recipe", "--load", "--save", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    parser.add_argument("--ckpt-step", type=int)
    return parser.parse_tolerantly(split_by_flags(argv, parser.flags())[0])[0]


def _checkpoint_folder(args: argparse.Namespace) -> Path:
    """The folder this run starts or resumes from."""
    for folder in (args.load or args.save, args.pretrained_checkpoint):
        if folder and (Path(folder) / TRACKER_FILE).exists():
            return Path(folder)
    if args.pretrained_checkpoint is None:
        raise UserError(
            "a checkpoint is required; pass --pretrained-checkpoint DIR (checkpoint_convert/hf_to_mcore.py makes one)"
        )
    raise UserError(
        f"--pretrained-checkpoint {args.pretrained_checkpoint} is not a Megatron checkpoint: {TRACKER_FILE} is "
        "missing; make one with checkpoint_convert/hf_to_mcore.py, or pass the --save folder of an earlier stage"
    )


def _read_record(folder: Path, step: Path | None) -> dict[str, Any] | None:
    """The settings a step was trained with; if it has none, those of the last start, which may have saved nothing."""
    paths = (place / RECIPE_FILE for place in (step or folder, folder))
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else usable(read_mapping(path, "run's recipe"))


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe as `--flag` → value (docs/design/recipes.md).

    Raises:
        UserError: the file is not a recipe.
    """
    if not path.exists():
        raise UserError(f"there is no recipe {path}; pass an existing file, such as launch/recipes/paper-stage1.yaml")
    recipe = read_mapping(path, "recipe")
    if "model_source" in recipe:
        raise UserError(
            f"{path} records a run's resolved flags; it is not a recipe; pass --recipe the file that the run was "
            "started with"
        )
    return {f"--{str(key).replace('_', '-')}": value for key, value in recipe.items()}


def recipe_argv(recipe: dict[str, Any]) -> list[str]:
    """A recipe as command-line arguments: true becomes the bare flag, false and null nothing, a list several values."""
    argv: list[str] = []
    for flag, value in recipe.items():
        if value is None or value is False:
            continue
        argv.append(flag)
        if value is not True:
            argv += map(str, value if isinstance(value, list) else [value])
    return argv


def shape_of(spec: ModelSpec) -> dict[str, Any]:
    """The model's shape: Megatron's name → value."""
    shape = dict(spec.megatron_args)
    if window := shape.get("window_size"):
        shape["window_size"] = ",".join(map(str, window))
    if spec.moe is not None:
        is_moe = [int(spec.is_moe_layer(layer)) for layer in range(shape["num_layers"])]
        shape |= {
            "num_experts": spec.moe.num_new_experts,
            "num_original_experts": spec.moe.num_original_experts,
            "original_copies": spec.moe.original_copies,
            "moe_router_topk": spec.moe.topk,
            "moe_ffn_hidden_size": shape["ffn_hidden_size"],
            "moe_layer_freq": str(is_moe).replace(" ", ""),
        }
    return shape


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
        argv += [switch.option_strings[0]] if switch is not None else [actions[0].option_strings[0], str(value)]
    return argv


def apply_machine(args: argparse.Namespace, record: Mapping[str, Any] | None = None) -> None:
    """Set what the machine requires: NCCL, bf16 and Transformer Engine if available, else gloo, fp32 and PyTorch.

    `record` are the settings of the run that is resumed.
    """
    if cpu.is_needed():
        for name, value in cpu.CPU_ARGUMENTS.items():
            setattr(args, name, value)
    elif not args.fp16 and not args.fp32:
        args.bf16 = True
    if args.async_save:
        args.use_persistent_ckpt_worker = True  # without it Megatron ignores --async-save
        if cpu.is_needed() or not is_installed("nvidia_resiliency_ext"):
            args.async_strategy = "mcore"
    choose_kernels(args, record)


def retain_interval(args: argparse.Namespace) -> int | None:
    """--save-retain-interval, rounded up to a multiple of --save-interval, as Megatron requires."""
    retain, save = args.save_retain_interval, args.save_interval
    return retain if not retain or not save else -(-retain // save) * save


def apply_method(args: argparse.Namespace, spec: ModelSpec) -> None:
    """Set what follows from stage and model; `args` must have passed the checks."""
    args.load = args.load or args.save
    if args.save and not args.tensorboard_dir:
        args.tensorboard_dir = str(Path(args.save) / "tensorboard")
    args.hetereogenous_dist_checkpoint = True  # one checkpoint key per layer, for every pipeline layout
    args.save_retain_interval = retain_interval(args)
    if (args.data_path or args.data_args_path) and args.split is None:
        args.split = "100,0,0"
    args.create_attention_mask_in_dataloader = False  # or tensor ranks would wait for one in --iterations-to-skip
    if spec.moe is None:
        args.lpr_loss_coeff = 0.0
        return
    if args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True
    for name, value in FIXED_FOR_MOE.items():
        setattr(args, name, value)
    if args.balance_loss_coeff is None:
        args.balance_loss_coeff = 0.01 if args.stage == "stage1" else 0.0
    args.lpr_loss_coeff = lpr_loss_coeff(args)
    args.moe_aux_loss_coeff = megatron_balance_coeff(args.balance_loss_coeff, spec.moe.topk, len(spec.moe.layers))
    args.moe_router_dtype = args.moe_router_dtype or "fp32"


def lpr_loss_coeff(args: argparse.Namespace) -> float:
    """The LPR loss's weight in an MoE stage."""
    default = 0.1 if args.stage == "stage2" else 0.0
    return default if args.lpr_loss_coeff is None else float(args.lpr_loss_coeff)


def resolved_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Every argument of the run with its final value, as plain YAML types; written to recipe.yaml."""
    plain = (str, int, float, bool, type(None))  # by exact type: enums that are also ints are not YAML
    settings: dict[str, Any] = {}
    for name, value in sorted(vars(args).items()):
        if type(value) in plain:
            settings[name] = value
        elif isinstance(value, list) and all(type(item) in plain for item in value):
            settings[name] = list(value)
        elif isinstance(value, torch.dtype):
            settings[name] = str(value)
    return settings
