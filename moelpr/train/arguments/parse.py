"""From the command line to settings: gather, check everything, register the result with Megatron."""

import argparse
import sys
from types import SimpleNamespace

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.vocab_utils import calculate_padded_vocab_size

from moelpr.base.errors import UserError
from moelpr.base.ranks import is_first_rank
from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.megatron import hooks
from moelpr.train.arguments.checks import find_notes, find_problems
from moelpr.train.arguments.checks.data import damaged_corpora
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.arguments.kernels import describe_kernels
from moelpr.train.arguments.length import set_train_iters, set_weights
from moelpr.train.arguments.requested import RequestedRun
from moelpr.train.arguments.requirements import apply_machine, apply_method
from moelpr.train.arguments.settings import RunSettings


def check_arguments(argv: list[str]) -> RequestedRun:
    """Parse and check the command line, without the program's name; UserError with all settings that are wrong."""
    run = RequestedRun.gather(argv, all_arguments())
    apply_machine(run)
    length, weights = set_train_iters(run), set_weights(run)
    problems = list(dict.fromkeys([*run.problems, *find_problems(run)])) or [*damaged_corpora(run)]
    if problems:
        several = [f"{len(problems)} settings are wrong:"] if len(problems) > 1 else []
        raise UserError("\n- ".join([*several, *problems]))
    if is_first_rank():
        for note in [*filter(None, (length, weights)), *find_notes(run), describe_kernels(run.args)]:
            print(f"moelpr: {note}", file=sys.stderr)
    return run


def register_arguments(run: RequestedRun, settings: RunSettings) -> argparse.Namespace:
    """Complete checked settings and register them with Megatron, which prints them; UserError if it rejects them."""
    apply_method(run, settings)
    try:
        # Megatron's additions to the parsed flags, such as the rank; its parser would only parse the same ones again.
        args = parse_args(lambda _: SimpleNamespace(parse_args=lambda: run.args))
        validate_args(args)
        core_transformer_config_from_args(args, config_class=MoELPRConfig)  # for its checks; the result is not used
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
        )
        with hooks.without_wandb():  # moelpr.train.track.tracking does
            set_global_variables(args, build_tokenizer=False)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise refused_by_megatron(error) from error
    return args


def refused_by_megatron(error: Exception) -> UserError:
    """Megatron's own error about a combination of settings, as one sentence."""
    return UserError(f"Megatron rejected these arguments: {' '.join(str(error).split()) or 'see --debug'}")
