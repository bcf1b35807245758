"""The trainer's flags in addition to Megatron's, and a parser that reports all wrong arguments at once."""

import argparse
import copy
import functools
import os
import re
from collections.abc import Collection, Iterable
from typing import Any, NoReturn, get_args

from moelpr.base.errors import UserError, did_you_mean
from moelpr.base.quantities import count_argument
from moelpr.data.mixing import Mix
from moelpr.model.stages import STAGE_HELP, Stage1Experts

# The environment variable with the default of --grace-seconds, which job scripts and manifests set.
GRACE_VARIABLE = "MOELPR_GRACE_SECONDS"
_SEE_HELP = "see python -m moelpr.pretrain --help-all"


_STAGES = "; ".join(f"{stage} {text}" for stage, text in STAGE_HELP.items())
_HELP = {
    "--stage": f"Training stage (required). {_STAGES}.",
    "--recipe": "YAML file of flags, or the name of one of moelpr; the command line overrides it (default: none).",
    "--train-tokens": "Tokens to train on, such as 24B or 1.5e9, rounded up to whole steps (default: --train-iters).",
    "--train-epochs": "The same in epochs: an epoch has as many tokens as all corpora of --data-path together, "
    "whatever their weights (the log lists each corpus); rounded down to whole steps (default: --train-iters).",
    "--mix": "Weights for the corpora of --data-path, from their sizes: temperature=T is the exponent, max-epochs=E "
    "how often a corpus is read at most (default: 4); what it cannot give, the others do (default: no --mix).",
    "--num-original-experts": "Original experts per MoE layer; --num-experts are new ones (default: the checkpoint's).",
    "--original-copies": "Router rows of the dense FFN per MoE layer (default: the checkpoint's).",
    "--softmax-scale": "Multiplier of attention's scores (default: the checkpoint's).",
    "--norms-after": "OLMo 2's norms: of outputs, and of queries and keys over all heads (default: the checkpoint's).",
    "--residual-multiplier": "Multiplier of what attention and FFN add to the residual (default: the checkpoint's).",
    "--balance-loss-coeff": "Weight of the balance loss, on the published code's scale (default: 0.01 in stage1).",
    "--lpr-loss-coeff": "Weight of the LPR (language priors routing) loss (default: 0.1 in stage2 and sft).",
    "--lpr-loss": "LPR loss of the paper, or of the published code: a double softmax (default: %(default)s).",
    "--stage1-experts": "Experts that tokens can choose in stage1: all, as in the paper, or new, so that all choices "
    "of a token are trained; stage2 routes over all (default: %(default)s).",
    "--train-everything": "Freeze nothing: the paper's plain-MoE ablation, which loses the original languages.",
    "--train-new-embeddings": "In stage1, train the embedding and output rows of new tokens too.",
    "--save-trained-only": "Omit frozen tensors from checkpoints; record where to find them (docs/checkpoints.md).",
    "--no-verify": "Do not compare checkpoints with their checksums when loading them.",
    "--validation-data": "Held-out corpora, one per language, scored in bits per byte before the first step, every "
    "--eval-interval steps, and at the end; --eval-iters N uses only N global batches of each (default: all).",
    "--verify-corpus": "What of the corpora to compare with checksums first: .idx, .lang and a sample of .bin; all "
    "(about 1 s per GB); or nothing (default: %(default)s).",
    "--warn-original-rise": "Warn if the stage1 loss on original text rises by more (default: %(default)s; 0: never).",
    "--warn-expert-share": "Warn if an expert gets a smaller share of tokens (default: %(default)s; 0: never).",
    "--warn-lpr-fall": "Warn if the LPR loss has fallen by less since the start (default: %(default)s; 0: never).",
    "--warn-window": "Number of steps averaged per warning check (default: %(default)s).",
    "--grace-seconds": "Seconds from a scheduler's request to stop to its kill; warn if a step and a save take longer "
    "(default: the variable MOELPR_GRACE_SECONDS).",
    "--mlflow-experiment": "Log to this experiment of MLflow, at the server that MLFLOW_TRACKING_URI names (default: "
    "none).",
    "--tracker-run": "Record of the run in trackers; several stages that share one are one run there, and the first "
    "makes it (default: tracker.json in --save, a run per stage).",
    "--fp32": "Train in fp32 (default: bf16 on a GPU, fp32 on a CPU).",
    "--allow-untested": "Flags of Megatron, without dashes, to accept although this trainer is not tested with them "
    "(default: none).",
    "--debug": "Show tracebacks of errors in arguments or input.",
    "--help-all": "Show Megatron's flags too, and exit.",
}


def add_arguments[P: argparse.ArgumentParser](parser: P) -> P:
    """Add the MoE-LPR group to `parser`, and return it."""
    group = parser.add_argument_group(title="MoE-LPR")

    def add(flag: str, **options: Any) -> None:
        group.add_argument(flag, help=_HELP[flag], **options)

    # Not "required" for argparse, which would stop there and not report the other flags.
    add("--stage", choices=tuple(STAGE_HELP))
    add("--recipe", metavar="FILE")
    add("--train-tokens", type=count_argument, metavar="N")
    add("--train-epochs", type=float, metavar="E")
    add("--mix", type=Mix.argument, metavar="temperature=T,max-epochs=E")
    add("--num-original-experts", type=int, default=1, metavar="M")
    add("--original-copies", type=int, default=1, metavar="C")
    add("--softmax-scale", type=float, metavar="M")
    add("--norms-after", action="store_true")
    add("--residual-multiplier", type=float, default=1.0, metavar="M")
    add("--balance-loss-coeff", type=float, metavar="ALPHA")
    add("--lpr-loss-coeff", type=float, metavar="GAMMA")
    add("--lpr-loss", choices=("paper", "reference"), default="paper")
    add("--stage1-experts", choices=get_args(Stage1Experts), default="all")
    add("--train-everything", action="store_true")
    add("--train-new-embeddings", action="store_true")
    add("--save-trained-only", action="store_true")
    add("--no-verify", action="store_true")
    add("--validation-data", nargs="+", metavar="LANG=PREFIX")
    add("--verify-corpus", choices=("sampled", "full", "none"), default="sampled")
    add("--warn-original-rise", type=float, default=10.0, metavar="PERCENT")
    add("--warn-expert-share", type=float, default=1.0, metavar="PERCENT")
    add("--warn-lpr-fall", type=float, default=1.0, metavar="PERCENT")
    add("--warn-window", type=int, default=50, metavar="STEPS")
    add("--grace-seconds", type=float, default=os.environ.get(GRACE_VARIABLE), metavar="S")
    add("--mlflow-experiment", metavar="NAME")
    add("--tracker-run", metavar="FILE")
    add("--fp32", action="store_true")
    add("--allow-untested", nargs="+", action="extend", metavar="FLAG")
    add("--debug", action="store_true")
    add("--help-all", action="help")
    return parser


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
                problems.append(f"{where}{names[0]}: {error.message}; {_SEE_HELP}")
                _, rest = split_by_flags(argv, names)
                if rest == argv:  # no flag to remove
                    raise UserError(problems[-1]) from error
                argv = rest
        flags = [item.split("=", 1)[0] for item in unknown if re.match("-[^0-9.]", item)]  # no negative numbers
        problems += [f"{where}unrecognized argument {flag}; {suggestion(flag, self.flags())}" for flag in flags]
        if unknown and not flags:  # next to an unrecognized flag they are most likely its values
            problems.append(f"{where}unrecognized value {' '.join(unknown)}; remove it, or add its flag")
        return namespace, problems


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
    return add_arguments(parser)


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
    return parser


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
