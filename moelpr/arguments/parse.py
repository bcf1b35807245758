"""From the command line to settings that Megatron has taken: gather, check everything, register."""

import argparse
import os
import sys

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.vocab_utils import calculate_padded_vocab_size

from moelpr.arguments.checks import complaints, notes
from moelpr.arguments.checks.run import Run
from moelpr.arguments.flags import add_arguments, all_arguments
from moelpr.arguments.machine import apply_machine
from moelpr.arguments.method import apply_method
from moelpr.arguments.sources import Sources
from moelpr.errors import UserError
from moelpr.model.config import MoELPRConfig
from moelpr.model_spec import ModelSpec


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, ModelSpec]:
    """Parse and check the command line, register it with Megatron, and return it with the model it trains.

    Nothing is built and no process group is set up before every setting has been checked.

    Raises:
        UserError: settings are wrong, contradict each other or would be ignored; all of them are named.
    """
    parser = all_arguments()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        sys.exit(0)
    sources = Sources.gather(argv, parser)
    draft = sources.draft  # tolerant of wrong words, so that the checks see the rest
    apply_machine(draft)
    run = Run.of(draft, sources)
    problems = [*sources.complaints, *complaints(run)]
    if problems:
        raise UserError(_as_message(problems))
    if os.environ.get("RANK", "0") == "0":
        for note in notes(run):
            print(f"moelpr: {note}", file=sys.stderr)
    assert sources.spec is not None, "a checkpoint without a spec is a complaint"
    return _taken_by_megatron(sources, sources.spec, run.is_resumed), sources.spec


def refused_by_megatron(error: Exception) -> UserError:
    """Megatron's own complaint about a combination of settings, as one sentence."""
    return UserError(f"Megatron refuses these arguments: {' '.join(str(error).split()) or 'see --debug'}")


def _as_message(problems: list[str]) -> str:
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return problems[0]
    return "\n- ".join([f"{len(problems)} settings are wrong:", *problems])


def _taken_by_megatron(sources: Sources, spec: ModelSpec, is_resumed: bool) -> argparse.Namespace:
    """Megatron's own parsing, checks and registration, the settings of machine and method applied."""
    sys.argv[1:] = sources.words
    try:
        args = parse_args(add_arguments)
        args.model_source, args.ckpt_step, args.is_resumed = str(sources.checkpoint), sources.step, is_resumed
        apply_machine(args)
        apply_method(args, spec)
        validate_args(args)
        core_transformer_config_from_args(args, config_class=MoELPRConfig)  # refuses more; the result is not needed
    except (AssertionError, ValueError, RuntimeError) as error:
        raise refused_by_megatron(error) from error
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
    )
    set_global_variables(args, build_tokenizer=False)
    return args
