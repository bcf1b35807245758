"""Our flags beside Megatron's, and a parser that reports every wrong word instead of stopping at the first."""

import argparse
import copy
import difflib
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from megatron.training.arguments import add_megatron_arguments

from moelpr.errors import UserError
from moelpr.stages import STAGE_HELP

_HELP = "see python -m moelpr.pretrain --help"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the MoE-LPR group to `parser`, and return it (Megatron's `extra_args_provider`)."""
    group = parser.add_argument_group(title="MoE-LPR")
    stages = "; ".join(f"{stage}: {text}" for stage, text in STAGE_HELP.items())
    # Needed, but not "required": argparse would stop there and say nothing about the other flags.
    group.add_argument("--stage", choices=tuple(STAGE_HELP), help=f"What to train (needed). {stages}.")
    group.add_argument(
        "--recipe", metavar="FILE", help="YAML file whose keys are flags; flags on the command line win."
    )
    group.add_argument(
        "--num-original-experts", type=int, default=1, metavar="M",
        help="Experts that are there before this round of languages, the dense FFN being the first. Like Megatron's "
        "--num-experts, here the number of new ones, it must agree with the checkpoint (default: the checkpoint's).",
    )  # fmt: skip
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
    group.add_argument(
        "--save-trained-only", action="store_true",
        help="Leave frozen tensors out of the checkpoints and note beside them where those lie (docs/checkpoints.md).",
    )  # fmt: skip
    group.add_argument(
        "--validation-data", nargs="+", metavar="LANG=PREFIX",
        help="Held-out corpora, one per language. Bits per byte of each are written before the first step, every "
        "--eval-interval steps and at the end (docs/method.md, metrics); --eval-iters N reads N global batches of each "
        "(default: all of it).",
    )  # fmt: skip
    group.add_argument(
        "--warn-original-rise", type=float, default=10.0, metavar="PERCENT",
        help="Warn when stage1 has made the loss of original-language text this much higher than at the start; 0: "
        "never (default: %(default)s).",
    )  # fmt: skip
    group.add_argument(
        "--warn-expert-share",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="Warn of an expert that fewer of the tokens choose; 0: never (default: %(default)s).",
    )
    group.add_argument(
        "--warn-lpr-fall", type=float, default=1.0, metavar="PERCENT",
        help="Warn when the language-priors-routing loss has fallen by less since the start; 0: never (default: "
        "%(default)s).",
    )  # fmt: skip
    group.add_argument(
        "--warn-window", type=int, default=50, metavar="STEPS",
        help="Steps whose mean the warnings look at (default: %(default)s).",
    )  # fmt: skip
    group.add_argument("--fp32", action="store_true", help="Train in fp32 on a GPU too (default there: bf16).")
    group.add_argument("--debug", action="store_true", help="Show the traceback of errors in arguments or input.")
    return parser


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors can be caught one by one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {_HELP}")

    def flags(self) -> dict[str, argparse.Action]:
        """Every `--flag` and what it sets."""
        return {flag: action for action in self._actions for flag in action.option_strings}

    def actions_of(self, name: str) -> list[argparse.Action]:
        """The actions behind an argument, named by its destination or by its flag."""
        flag = f"--{name.replace('_', '-')}"
        return [action for action in self._actions if action.dest == name or flag in action.option_strings]

    def parse_tolerantly(
        self, words: list[str], into: argparse.Namespace | None = None, where: str = ""
    ) -> tuple[argparse.Namespace, list[str]]:
        """The settings of `words` on top of `into`, and one sentence for each word that is wrong and left out.

        Args:
            where: how the sentences name the source, such as "in recipe.yaml, "; empty: the command line.
        """
        complaints: list[str] = []
        while True:
            try:
                namespace, unknown = self.parse_known_args(words, copy.copy(into))
                break
            except argparse.ArgumentError as error:
                names = (error.argument_name or "").split("/")
                complaints.append(f"{where}{names[0]}: {error.message}; {_HELP}")
                _, rest = split_words(words, names)
                if rest == words:  # not the fault of a flag we can leave out
                    raise UserError(complaints[-1]) from error
                words = rest
        return namespace, complaints + list(self._unknown(unknown, where))

    def _unknown(self, words: list[str], where: str) -> Iterable[str]:
        flags = [word.split("=", 1)[0] for word in words if word.startswith("-") and not _is_number(word)]
        for flag in flags:
            yield f"{where}there is no flag {flag}; {did_you_mean(flag, self.flags()) or _HELP}"
        if words and not flags:  # beside an unknown flag they are most likely its values
            yield f"{where}{' '.join(words)} belongs to no flag; drop it, or name its flag"


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """ "did you mean …?" with the most similar of the known words, or None where none is similar."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"did you mean {nearest[0]}?" if nearest else None


@functools.cache
def all_arguments() -> Parser:
    """Our flags first, then Megatron's."""
    parser = Parser(
        prog="python -m moelpr.pretrain",
        usage="python -m moelpr.pretrain --stage STAGE --pretrained-checkpoint DIR --data-path PREFIX --save DIR …",
        description="Train one stage of MoE-LPR. The model's shape comes from the checkpoint's model_spec.json.",
    )
    add_megatron_arguments(add_arguments(parser))
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")  # some of Megatron's texts hold a bare %
        if callable(action.type) and not isinstance(action.type, type):
            action.type = _with_argparse_errors(action.type)
    return parser


def _with_argparse_errors(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Some of Megatron's converters evaluate their text and fail with whatever comes."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except Exception as error:
            raise argparse.ArgumentTypeError(f"{text!r} can't be read ({error or type(error).__name__})") from error

    return converted


def split_words(words: list[str], flags: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of these flags with their values, and all others."""
    theirs: list[str] = []
    others: list[str] = []
    part = others
    for word in words:
        if word.startswith("--"):
            part = theirs if word.split("=", 1)[0] in flags else others
        part.append(word)
    return theirs, others


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
