"""The trainer's command line: Megatron's flags, ours, recipes, and every check across fields.

Settings come from four places, each overriding the one before: the model's shape from the checkpoint's
`model_spec.json`, the recipe (`--recipe FILE`, a YAML file whose keys are flags), the command line, and last what the
machine forces (CPU or GPU, Transformer Engine or not). All four speak in Megatron's and our flags.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.vocab_utils import calculate_padded_vocab_size

from moelpr.compat import cpu
from moelpr.errors import UserError
from moelpr.model.losses import megatron_balance_coeff
from moelpr.model.stages import STAGE_HELP
from moelpr.model_spec import ModelSpec

# Where our default differs from Megatron's: the models this trainer starts from were trained without dropout, and a
# validation pass happens only when it is asked for.
_DEFAULTS = (
    "--attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --eval-interval 1000 --save-interval 500 --log-interval 10"
).split()

# Parts of the model's description that training may change.
_FREE_SHAPE = ("attention_dropout", "hidden_dropout", "init_method_std")

# Flags of Megatron that would change the method or be ignored by our layer, with the one value that is right.
_FIXED_FOR_MOE = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_expert_capacity_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None,
    "moe_grouped_gemm": False,  # the experts have grouped matrix products of their own
    "cuda_graph_impl": "none",
    "overlap_moe_expert_parallel_comm": False,
}


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, ModelSpec]:
    """Parse and check the command line, register it with Megatron, and return it with the model it trains.

    Raises:
        UserError: a setting is wrong, contradicts another or would be ignored.
    """
    parser = _all_arguments()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        sys.exit(0)
    early = _early_arguments(argv)
    source = checkpoint_source(early)
    spec = ModelSpec.read(source)
    settings = recipe_to_flags(Path(early.recipe)) if early.recipe else []
    sys.argv[1:] = [*_DEFAULTS, *_spec_to_flags(spec, parser), *settings, *argv]
    parser.parse_args(sys.argv[1:])  # Megatron's own parser answers a misspelt flag with hundreds of lines
    args = parse_args(add_arguments)
    args.model_source = str(source)
    typed = {word.split("=", 1)[0] for word in (*settings, *argv) if word.startswith("--")}
    _refuse_other_shape(args, spec, typed, parser)
    _refuse_other_run(args, source)
    _apply_machine(args)
    _apply_stage(args, spec, typed)
    try:
        validate_args(args)
    except (AssertionError, ValueError) as error:
        raise refused_by_megatron(error) from error
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
    )
    set_global_variables(args, build_tokenizer=False)
    return args, spec


def refused_by_megatron(error: Exception) -> UserError:
    """Megatron's own complaint about a combination of settings, as one sentence."""
    return UserError(f"Megatron refuses these arguments: {' '.join(str(error).split()) or 'see --debug'}")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="MoE-LPR")
    stages = "; ".join(f"{stage}: {text}" for stage, text in STAGE_HELP.items())
    group.add_argument("--stage", choices=tuple(STAGE_HELP), required=True, help=f"What to train. {stages}.")
    group.add_argument(
        "--recipe", metavar="FILE", help="YAML file whose keys are flags; flags on the command line win."
    )
    group.add_argument(
        "--balance-loss-coeff", type=float, metavar="ALPHA",
        help="Weight of the load-balancing loss on the scale of the paper's experiments (default: 0.01 in stage1, 0 in "
        "stage2).",
    )  # fmt: skip
    group.add_argument(
        "--lpr-loss-coeff", type=float, metavar="GAMMA",
        help="Weight of the language-priors-routing loss, the paper's gamma (default: 0 in stage1, 0.1 in stage2). "
        "Both losses may be used together: stage1 with a GAMMA is the paper's one-stage ablation.",
    )  # fmt: skip
    group.add_argument(
        "--lpr-loss", choices=("paper", "reference"), default="paper",
        help="paper: the paper's formula; reference: the published code's double softmax, for comparison "
        "(default: %(default)s).",
    )  # fmt: skip
    group.add_argument(
        "--train-everything", action="store_true",
        help="Freeze nothing: the paper's plain-MoE ablation. Original languages are lost.",
    )  # fmt: skip
    group.add_argument("--fp32", action="store_true", help="Train in fp32 on a GPU too (default there: bf16).")
    group.add_argument("--debug", action="store_true", help="Show the traceback of errors in arguments or input.")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m moelpr.pretrain --help")


def _all_arguments() -> argparse.ArgumentParser:
    """Our flags first, then Megatron's."""
    parser = _Parser(
        prog="python -m moelpr.pretrain",
        usage="python -m moelpr.pretrain --stage STAGE --pretrained-checkpoint DIR --data-path PREFIX --save DIR …",
        description="Train one stage of MoE-LPR. The model's shape comes from the checkpoint's model_spec.json.",
        allow_abbrev=False,
    )
    add_megatron_arguments(add_arguments(parser))
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")  # some of Megatron's texts hold a bare %
    return parser


def _early_arguments(argv: list[str]) -> argparse.Namespace:
    """The few flags that say where the others come from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--recipe", "--load", "--save", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    early, _ = parser.parse_known_args(argv)
    if early.recipe:
        settings, _ = parser.parse_known_args(recipe_to_flags(Path(early.recipe)))
        for name, value in vars(settings).items():
            if getattr(early, name) is None:
                setattr(early, name, value)
    return early


def checkpoint_source(args: argparse.Namespace) -> Path:
    """The folder this run starts or resumes from."""
    for folder in (args.load or args.save, args.pretrained_checkpoint):
        if folder and (Path(folder) / "latest_checkpointed_iteration.txt").exists():
            return Path(folder)
    if args.pretrained_checkpoint is None:
        raise UserError(
            "no checkpoint to start from; name one with --pretrained-checkpoint "
            "(checkpoint_convert/hf_to_mcore.py makes it from a Hugging Face model)"
        )
    raise UserError(
        f"{args.pretrained_checkpoint} holds no Megatron checkpoint (latest_checkpointed_iteration.txt is missing); "
        "make one with checkpoint_convert/hf_to_mcore.py or name a folder written by an earlier stage"
    )


def recipe_to_flags(path: Path) -> list[str]:
    """A YAML mapping of flag names to values as command-line words: true is the bare flag, false and null no word."""
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"the recipe {path} can't be read: {error.strerror}; check --recipe") from error
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {path} is not valid YAML: {error}".replace("\n", " ")) from error
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {path} must be a YAML mapping of flag names to values")
    words: list[str] = []
    for key, value in recipe.items():
        if value is None or value is False:
            continue
        words.append(f"--{str(key).replace('_', '-')}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return words


def _shape(spec: ModelSpec) -> dict[str, Any]:
    """The model's shape: Megatron argument -> value."""
    shape = dict(spec.megatron_args)
    if spec.moe is not None:
        is_moe = [int(spec.is_moe_layer(layer)) for layer in range(shape["num_layers"])]
        shape |= {
            "num_experts": spec.moe.num_new_experts,
            "moe_router_topk": spec.moe.topk,
            "moe_ffn_hidden_size": shape["ffn_hidden_size"],
            "moe_layer_freq": str(is_moe).replace(" ", ""),
        }
    return shape


def _actions_of(name: str, parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The actions behind an argument, named by its destination or by its flag."""
    flag = f"--{name.replace('_', '-')}"
    actions = [action for action in parser._actions if action.dest == name or flag in action.option_strings]
    if not actions:
        raise UserError(
            f"model_spec.json names {name}, which this Megatron has no argument for; convert the model again"
        )
    return actions


def _spec_to_flags(spec: ModelSpec, parser: argparse.ArgumentParser) -> list[str]:
    """The model's shape as Megatron flags."""
    words: list[str] = []
    for name, value in _shape(spec).items():
        actions = _actions_of(name, parser)
        if value is None or value == actions[0].default:
            continue
        switch = next((action for action in actions if action.nargs == 0 and action.const == value), None)
        if switch is not None:
            words.append(switch.option_strings[0])
        else:
            words += [actions[0].option_strings[0], str(value)]
    return words


def _refuse_other_shape(
    args: argparse.Namespace, spec: ModelSpec, typed: set[str], parser: argparse.ArgumentParser
) -> None:
    """A recipe or command line may not contradict the checkpoint: one of the two would be ignored."""
    for name, value in _shape(spec).items():
        if name in _FREE_SHAPE:
            continue
        action = _actions_of(name, parser)[0]
        found = getattr(args, action.dest)
        wanted = action.type(value) if callable(action.type) and isinstance(value, str) else value
        if value is not None and found != wanted and typed & set(action.option_strings):
            raise UserError(
                f"{action.option_strings[0]} {found} contradicts the checkpoint {args.model_source}, whose "
                f"model_spec.json says {value}; drop the flag, or convert the model again"
            )


def _refuse_other_run(args: argparse.Namespace, source: Path) -> None:
    """Resuming needs a run of the same stage whose optimizer state fits.

    Megatron keeps one optimizer with EP = 1 and two with EP > 1: optimizer state cannot cross that line.
    """
    recipe = source / "recipe.yaml"
    if source not in {Path(folder) for folder in (args.load, args.save) if folder} or args.finetune:
        return
    if not recipe.is_file():
        raise UserError(
            f"{source} holds a checkpoint but no run to resume; give another folder to --save and name this one with "
            "--pretrained-checkpoint"
        )
    settings = yaml.safe_load(recipe.read_text())
    if settings.get("stage") != args.stage:
        raise UserError(
            f"{source} holds a run of --stage {settings.get('stage')}, which --stage {args.stage} cannot resume; give "
            "another folder to --save and name this one with --pretrained-checkpoint"
        )
    if args.no_load_optim:
        return
    before = settings.get("expert_model_parallel_size", 1)
    now = args.expert_model_parallel_size
    if (before == 1) != (now == 1):
        raise UserError(
            f"{source} was trained with --expert-model-parallel-size {before}; its optimizer state does not fit {now}. "
            f"Keep {before}, or start the optimizer afresh with --no-load-optim"
        )


def _apply_machine(args: argparse.Namespace) -> None:
    """NCCL, bf16 and Transformer Engine where the machine has them; gloo, fp32 and torch's kernels where not."""
    if cpu.is_needed():
        for name, value in cpu.CPU_ARGUMENTS.items():
            setattr(args, name, value)
    elif not args.fp16 and not args.fp32:
        args.bf16 = True
    if args.transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        args.transformer_impl = "local"
    # Megatron's own linear layers (original expert, output layer) need Apex for it, with Transformer Engine or without.
    args.gradient_accumulation_fusion = args.gradient_accumulation_fusion and _has_apex()
    if args.transformer_impl == "local":
        args.no_persist_layer_norm = True
        args.apply_rope_fusion = False
        args.masked_softmax_fusion = False
        _refuse_without_transformer_engine(args)


def _refuse_without_transformer_engine(args: argparse.Namespace) -> None:
    needs = {
        "--context-parallel-size": args.context_parallel_size > 1,
        "--attention-dropout": args.attention_dropout > 0,
        "--window-size": args.window_size is not None,
    }
    for flag, is_set in needs.items():
        if is_set:
            raise UserError(
                f"{flag} needs Transformer Engine's attention; install transformer-engine, or drop the flag"
            )


def _has_apex() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _apply_stage(args: argparse.Namespace, spec: ModelSpec, typed: set[str]) -> None:
    args.load = args.load or args.save
    if args.save and not args.tensorboard_dir:
        args.tensorboard_dir = str(Path(args.save) / "tensorboard")
    args.hetereogenous_dist_checkpoint = True  # one checkpoint key per layer, whatever the pipeline layout
    if args.data_path and args.split is None:
        args.split = "100,0,0"
    if args.reset_attention_mask:
        raise UserError("--reset-attention-mask has no effect: attention is causal over the packed sequence; drop it")
    if args.train_iters is None and args.train_samples is None:
        raise UserError("nothing says how long to train; give --train-iters STEPS (or --train-samples SEQUENCES)")
    if args.stage == "dense":
        _apply_dense(args, spec)
    else:
        _apply_moe(args, spec, typed)


def _apply_dense(args: argparse.Namespace, spec: ModelSpec) -> None:
    if spec.moe is not None:
        raise UserError(
            f"--stage dense was given the MoE checkpoint {args.model_source}; use --stage stage1 or stage2, "
            "or convert the model with checkpoint_convert/hf_to_mcore.py --dense"
        )
    ignored = [name for name in ("balance_loss_coeff", "lpr_loss_coeff") if getattr(args, name) is not None]
    if ignored or args.train_everything:
        flag = f"--{(ignored or ['train_everything'])[0].replace('_', '-')}"
        raise UserError(f"{flag} has no meaning for a dense model; drop it or use --stage stage1")
    args.lpr_loss_coeff = 0.0


def _apply_moe(args: argparse.Namespace, spec: ModelSpec, typed: set[str]) -> None:
    if spec.moe is None:
        raise UserError(
            f"--stage {args.stage} needs an upcycled checkpoint, but {args.model_source} is dense; "
            "upcycle it with checkpoint_convert/hf_to_mcore.py --num-new-experts N"
        )
    spec.moe.check(args.num_layers)
    parallel, new_experts = args.expert_model_parallel_size, args.num_experts
    if new_experts % parallel:
        works = [size for size in range(1, new_experts + 1) if new_experts % size == 0]
        raise UserError(
            f"{new_experts} new experts do not divide over --expert-model-parallel-size {parallel}; "
            f"use one of {', '.join(map(str, works))}"
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        print("moelpr: tensor parallelism with experts needs --sequence-parallel: switched on", file=sys.stderr)
        args.sequence_parallel = True
    for name, value in _FIXED_FOR_MOE.items():
        # Megatron's own defaults differ in places: only what the user typed can clash.
        flag = f"--{name.replace('_', '-')}"
        if flag in typed and getattr(args, name) != value:
            raise UserError(f"{flag} {getattr(args, name)} does not work with the MoE-LPR layer; leave it at {value}")
        setattr(args, name, value)
    etp = args.expert_tensor_parallel_size
    if etp not in (None, 1, args.tensor_model_parallel_size):
        raise UserError(
            f"--expert-tensor-parallel-size {etp} must be 1 or the tensor-parallel size "
            f"{args.tensor_model_parallel_size}, over which the original expert is split"
        )
    if args.fp8:
        raise UserError("--fp8-format does not reach the new experts, which have no FP8 yet; drop it")
    if "--moe-aux-loss-coeff" in typed:
        raise UserError("--moe-aux-loss-coeff would be overwritten; use --balance-loss-coeff, which is converted to it")
    first = args.stage == "stage1"
    if args.balance_loss_coeff is None:
        args.balance_loss_coeff = 0.01 if first else 0.0
    if args.lpr_loss_coeff is None:
        args.lpr_loss_coeff = 0.0 if first else 0.1
    args.moe_aux_loss_coeff = megatron_balance_coeff(args.balance_loss_coeff, spec.moe.topk, len(spec.moe.layers))
    args.moe_router_dtype = args.moe_router_dtype or "fp32"


def resolved_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag of the run with its final value, as plain YAML types; written beside the checkpoints."""
    plain = (str, int, float, bool, type(None))  # by exact type: enums that are also ints are no YAML
    settings: dict[str, Any] = {}
    for name, value in sorted(vars(args).items()):
        if type(value) in plain:
            settings[name] = value
        elif isinstance(value, list) and all(type(item) in plain for item in value):
            settings[name] = list(value)
        elif isinstance(value, torch.dtype):
            settings[name] = str(value)
    return settings
