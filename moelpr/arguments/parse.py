"""From the command line to settings registered with Megatron: gather, check everything, register."""

import argparse
import sys

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.vocab_utils import calculate_padded_vocab_size

from moelpr.arguments.checks import find_notes, find_problems
from moelpr.arguments.checks.data import damaged_corpora
from moelpr.arguments.flags import add_arguments, all_arguments
from moelpr.arguments.kernels import describe_kernels
from moelpr.arguments.settings import RunSettings, apply_machine, apply_method
from moelpr.model.config import MoELPRConfig
from moelpr.model_spec import ModelSpec
from moelpr.process.errors import UserError
from moelpr.process.ranks import is_first_rank


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, ModelSpec]:
    """`check_arguments`, then `register_arguments`."""
    return register_arguments(check_arguments(argv))


def check_arguments(argv: list[str]) -> RunSettings:
    """Parse and check the command line, which is without the program's name, before anything is built.

    Raises:
        UserError: settings are invalid, contradict each other or would be ignored; the message names all of them.
    """
    run = RunSettings.gather(argv, all_arguments())
    apply_machine(run.args, run.record if run.is_resumed else None)
    problems = list(dict.fromkeys([*run.problems, *find_problems(run)])) or [*damaged_corpora(run)]
    if problems:
        several = [f"{len(problems)} settings are wrong:"] if len(problems) > 1 else []
        raise UserError("\n- ".join([*several, *problems]))
    if is_first_rank():
        for note in find_notes(run):
            print(f"moelpr: {note}", file=sys.stderr)
        print(f"moelpr: {describe_kernels(run.args)}", file=sys.stderr)
    run.describe_start(run.args)
    if run.args.global_batch_size is None:
        run.args.global_batch_size = run.args.micro_batch_size * run.layout.dp  # as Megatron does
    return run


def register_arguments(run: RunSettings) -> tuple[argparse.Namespace, ModelSpec]:
    """Register checked settings with Megatron, which prints them all; returns its arguments and the model's spec.

    Raises:
        UserError: Megatron rejects them.
    """
    assert run.spec is not None, "a checkpoint without a spec is a problem"
    sys.argv[1:] = run.argv
    try:
        args = parse_args(add_arguments)
        run.describe_start(args)
        apply_machine(args, run.record if run.is_resumed else None)
        apply_method(args, run.spec)
        validate_args(args)
        core_transformer_config_from_args(args, config_class=MoELPRConfig)  # for its checks; the result is not used
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
        )
        set_global_variables(args, build_tokenizer=False)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise refused_by_megatron(error) from error
    return args, run.spec


def refused_by_megatron(error: Exception) -> UserError:
    """Megatron's own error about a combination of settings, as one sentence."""
    return UserError(f"Megatron rejected these arguments: {' '.join(str(error).split()) or 'see --debug'}")
