"""The trainer's flags in addition to Megatron's, and a parser that reports all wrong arguments at once."""

import argparse
import copy
import functools
import math
import os
import re
from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal, NoReturn

from moelpr.base.errors import UserError, did_you_mean
from moelpr.base.quantities import Tokens
from moelpr.base.settings import Flags, add_flags, metavar, number
from moelpr.data.mixing import Mix
from moelpr.model.stages import STAGE_HELP, Stage, Stage1Experts
from moelpr.train.arguments.supported import SUPPORTED

# The environment variable with the default of --grace-seconds, which job scripts and manifests set.
GRACE_VARIABLE = "MOELPR_GRACE_SECONDS"
_SEE_HELP = "see python -m moelpr.pretrain --help-all"


# Least value and the bound that it must be below.
_RANGES: dict[tuple[int, float], str] = {
    (1, math.inf): (
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
        "expert_tensor_parallel_size num_virtual_stages_per_pipeline_rank make_vocab_size_divisible_by "
        "micro_batch_size global_batch_size seq_length train_iters save_interval log_interval "
        "eval_interval lr_decay_iters lr_wsd_decay_iters "
        "tensorboard_log_interval log_memory_interval train_tokens early_stop_patience gpu_sniff_test_interval"
    ),
    (1, 2**31): "seed",
    (0, math.inf): (
        "lr min_lr lr_warmup_init lr_warmup_iters weight_decay clip_grad balance_loss_coeff "
        "lpr_loss_coeff eval_iters grace_seconds manual_gc_interval"
    ),
    (0, 10**6): "train_epochs",
    (0, 1): "adam_beta1 adam_beta2 lr_warmup_fraction",
}
_BOUNDS = {name: bounds for bounds, names in _RANGES.items() for name in names.split()}
_STAGES = "; ".join(f"{stage} {text}" for stage, text in STAGE_HELP.items())


class TrainerFlags(Flags):
    # Not required for argparse, which would stop there and not report the other flags.
    stage: Annotated[Stage | None, {"help": f"training stage (required): {_STAGES}"}] = None
    # YAML file of flags, or a name of moelpr's; flags override it (default: none)
    recipe: Annotated[str | None, metavar("FILE")] = None
    train_tokens: Tokens | None = None  # length in tokens, rounded up to steps (default: --train-iters)
    # passes over all corpora together, rounded down to steps (default: --train-iters)
    train_epochs: float | None = None
    # weights of corpora by size: exponent, and most epochs of one (default: no --mix)
    mix: Annotated[Mix | None, {"type": Mix.argument}, metavar("temperature=T,max-epochs=E")] = None
    num_original_experts: int = 1  # per MoE layer; --num-experts are new (default: the checkpoint's)
    original_copies: int = 1  # router rows of the dense FFN per MoE layer (default: the checkpoint's)
    softmax_scale: float | None = None  # multiplier of attention's scores (default: the checkpoint's)
    norms_after: bool = False  # OLMo 2's norms: of outputs, queries and keys (default: the checkpoint's)
    residual_multiplier: float = 1.0  # multiplier of attention and FFN (default: the checkpoint's)
    balance_loss_coeff: float | None = None  # weight of the balance loss (default: 0.01 in stage1)
    lpr_loss_coeff: float | None = None  # weight of the LPR loss (default: 0.1 in stage2 and sft)
    lpr_loss: Literal["paper", "reference"] = "paper"  # the paper's, or that of the published code: a double softmax
    stage1_experts: Stage1Experts = "all"  # experts that tokens can choose in stage1; stage2 routes over all
    train_everything: bool = False  # freeze nothing: the paper's plain-MoE ablation, which loses the original languages
    train_new_embeddings: bool = False  # in stage1, train the embedding and output rows of new tokens too
    save_trained_only: bool = False  # omit frozen tensors from checkpoints (docs/checkpoints.md)
    no_verify: bool = False  # do not compare checkpoints with their checksums when loading them
    # held-out corpora, scored every --eval-interval steps (default: none)
    validation_data: Annotated[list[str] | None, metavar("LANG=PREFIX")] = None
    # end if their mean loss has not fallen for so long; the best saved step is the result (default: train to the end)
    early_stop_patience: Annotated[Tokens | None, metavar("TOKENS")] = None
    verify_corpus: Literal["sampled", "full", "none"] = "sampled"  # how much of corpora to compare with checksums
    # time from a request to stop to the kill; warn if a save takes longer (default: MOELPR_GRACE_SECONDS)
    grace_seconds: Annotated[float | None, {"default": os.environ.get(GRACE_VARIABLE)}] = None
    mlflow_experiment: str | None = None  # log to it, at MLFLOW_TRACKING_URI (default: none)
    # record of the run, which stages may share (default: tracker.json in --save)
    tracker_run: Annotated[str | None, metavar("FILE")] = None
    bf16_moments: bool = False  # keep Adam's moments in bf16, and weights in bf16 and 16 bits more
    fp32: bool = False  # train in fp32 (default: bf16 on a GPU, fp32 on a CPU)
    # untested flags of Megatron to accept (default: none)
    allow_untested: Annotated[list[str] | None, {"action": "extend"}, metavar("FLAG")] = None
    debug: bool = False  # show tracebacks of errors in arguments or input


class Parser(argparse.ArgumentParser):
    """argparse for the trainer, which reports all wrong arguments of several sources, and takes no abbreviations.

    Other commands have a `CommandParser`, which ends at the first error, as argparse does.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {_SEE_HELP}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            raise
        except Exception as error:  # some of Megatron's converters evaluate their text
            message = f"invalid value {arg_string!r} ({error or type(error).__name__})"
            raise argparse.ArgumentError(action, message) from error

    def flags(self) -> dict[str, argparse.Action]:
        """Every `--flag` and its action."""
        return {flag: action for action in self._actions for flag in action.option_strings}

    def actions_of(self, name: str) -> list[argparse.Action]:
        """The actions of an argument, given its destination or flag name."""
        flag = f"--{name.replace('_', '-')}"
        return [action for action in self._actions if action.dest == name or flag in action.option_strings]

    def parse_tolerantly(
        self, argv: list[str], into: argparse.Namespace | None = None, where: str = ""
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse what is valid, and report the rest: returns the settings, and one message per invalid argument.

        Starts from a copy of `into`. `where` is a prefix of the messages that names the source: "in recipe.yaml, ".
        """
        problems: list[str] = []
        while True:
            try:
                namespace, unknown = self.parse_known_args(argv, copy.copy(into))
                break
            except argparse.ArgumentError as error:
                names = (error.argument_name or "").split("/")
                message = re.sub("^: must", " must", f": {error.message}")
                problems.append(f"{where}{names[0]}{message}; {_SEE_HELP}")
                _, rest = split_by_flags(argv, names)
                if rest == argv:  # no flag to remove
                    raise UserError(problems[-1]) from error
                argv = rest
        flags = [item.split("=", 1)[0] for item in unknown if re.match("-[^0-9.]", item)]  # no negative numbers
        problems += [f"{where}unrecognized argument {flag}; {suggestion(flag, self.flags())}" for flag in flags]
        if unknown and not flags:  # next to an unrecognized flag they are most likely its values
            problems.append(f"{where}unrecognized value {' '.join(unknown)}; remove it, or add its flag")
        return namespace, problems


def supported_arguments(*more: str) -> Parser:
    """The parser of our flags and the tested ones of Megatron, which checks values, made without torch and Megatron."""
    parser = own_arguments()
    for name, value in (SUPPORTED | {flag[2:]: "TEXT" for flag in more}).items():
        if value:
            options = {"choices": value.split("|")} if "|" in value else {"type": {"N": int, "X": float}.get(value[0])}
            parser.add_argument(f"--{name}", nargs=value[-1] if value[-1] in "+*" else None, **options)
        else:
            parser.add_argument(f"--{name}", action="store_true")
    return _with_bounds(parser)


def _with_bounds(parser: Parser) -> Parser:
    """Numbers are finite, and neither too small nor too large."""
    for action in parser._actions:
        if action.type is float or (action.type is int and action.dest in _BOUNDS):
            least, below = _BOUNDS.get(action.dest, (-math.inf, math.inf))
            action.type = number(action.type, least, below=below)["type"]
    return parser


def suggestion(name: str, known: Iterable[str]) -> str:
    """Ask for the nearest of the known flags; if none is near, say where they are listed."""
    return did_you_mean(name, known, _SEE_HELP)


def own_arguments() -> Parser:
    """The parser of the MoE-LPR flags, for --help; imports neither torch nor Megatron."""
    parser = Parser(
        prog="python -m moelpr.pretrain",
        usage="python -m moelpr.pretrain --stage STAGE --pretrained-checkpoint DIR --data-path PREFIX --save DIR …",
        description="Train one stage of MoE-LPR. The model's shape comes from the checkpoint's model_spec.json.",
        epilog="Megatron's flags: --help-all. The exit code is 0 after the last step, 75 if the run was asked to stop "
        "before it (SIGTERM, SIGUSR1 or a file STOP in --save), 2 for wrong arguments or input, and 1 for a failure.",
    )
    group = parser.add_argument_group(title="MoE-LPR")
    add_flags(group, TrainerFlags)
    group.add_argument("--help-all", action="help", help="show Megatron's flags too, and exit")
    return parser


@functools.cache
def all_arguments() -> Parser:
    """The trainer's parser: MoE-LPR flags first, then Megatron's."""
    from megatron.training.arguments import add_megatron_arguments  # takes seconds

    parser = own_arguments()
    parser.epilog = None
    add_megatron_arguments(parser)
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")  # some of Megatron's help texts contain a bare %
    return _with_bounds(parser)


def split_by_flags(argv: list[str], flags: Collection[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those of the given flags, with their values, and all others."""
    chosen: list[str] = []
    others: list[str] = []
    part = others
    for item in argv:
        if item.startswith("--"):
            part = chosen if item.split("=", 1)[0] in flags else others
        part.append(item)
    return chosen, others


def values_of(argv: list[str]) -> dict[str, str]:
    """The first value of each `--flag`, at its last occurrence, for what must be known before flags can be parsed."""
    values: dict[str, str] = {}
    flag = ""
    for item in argv:
        if not item.startswith("--"):
            values.setdefault(flag, item)
            continue
        flag, is_assigned, value = item.partition("=")
        values.pop(flag, None)
        if is_assigned:
            values[flag] = value
    return values
