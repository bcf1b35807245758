"""Run a stage's command line without a GPU, as the first, a middle and the last rank of its cluster.

    moelpr check stage1 --nnodes 128 --nproc-per-node 8 --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX …

takes the very command line of a stage, and starts the real trainer on tensors without values. What a start on the
cluster would refuse is refused with the same message. A checkpoint that is not here needs only its model_spec.json, or
--hf-path and --num-new-experts; corpora may be missing. docs/design/planner.md says what a dry run can't see.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import get_args

from moelpr.base.command import CommandParser, program_name, run_command
from moelpr.base.errors import UserError
from moelpr.model.families.families import read_base
from moelpr.model.families.hub import config_folder
from moelpr.model.families.new_experts import with_new_experts
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES, Stage
from moelpr.plan.arguments import add_expert_flags, new_experts
from moelpr.plan.gpus import GPUS
from moelpr.train.check.whole_run import check, prepare

# Options of the launcher that change nothing here.
_IGNORED = ("--node-rank", "--master-addr", "--master-port", "--join-timeout")


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = _parser()
    own, trainers = _split(sys.argv[1:], parser)
    args = parser.parse_args(own)
    prepare(args.gpu, args.nproc_per_node)
    spec = _upcycled(args)
    outcome = check(["--stage", args.stage, *trainers], args.nnodes, args.nproc_per_node, lambda: spec)
    from moelpr.train.check import tables  # only now, as it imports torch

    for note in outcome.notes:
        print(note, file=sys.stderr)
    if args.json:
        print(json.dumps(tables.numbers(outcome, args.nproc_per_node), indent=2))
    else:
        print(tables.report(outcome, GPUS[args.gpu], args.nproc_per_node))


def _split(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The words for this command's own flags, and the trainer's."""
    from moelpr.train.arguments.flags import split_by_flags

    flags = {flag for action in parser._actions for flag in action.option_strings}
    dashed = [
        word.replace("_", "-") if word.startswith("--") and word.split("=")[0].replace("_", "-") in flags else word
        for word in words
    ]
    own, trainers = split_by_flags(dashed[1:], flags)
    return dashed[:1] + own, trainers


def _upcycled(args: argparse.Namespace) -> ModelSpec | None:
    """The model that --hf-path and the flags for experts describe."""
    if args.hf_path is None:
        return None
    family, base = read_base(config_folder(args.hf_path))
    spec = base
    if args.stage not in DENSE_STAGES:
        if args.num_new_experts is None:
            raise UserError(f"--hf-path requires new experts for {args.stage}; pass --num-new-experts N")
        spec = with_new_experts(family, base, new_experts(args, base))
    return spec.with_new_tokens(base.megatron_args["vocab_size"], args.num_new_tokens) if args.num_new_tokens else spec


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog=program_name("python -m moelpr.train.check"), description=__doc__)
    add = parser.add_argument
    add("stage", choices=get_args(Stage), metavar="STAGE", help="the stage; all flags of its launcher may follow")
    add("--nnodes", type=_count, default=1, metavar="N", help="number of nodes (default: 1)")
    add("--nproc-per-node", type=_count, default=8, metavar="M", help="GPUs per node (default: 8)")
    for flag in _IGNORED:
        add(flag, help=argparse.SUPPRESS)
    add("--gpu", choices=GPUS, default="h100-80", metavar="GPU", help=f"of {', '.join(GPUS)} (default: %(default)s)")
    add("--json", action="store_true", help="print JSON (bytes, launches, FLOPs, seconds) instead of tables")
    path = "the base of a checkpoint that is not here: directory with config.json, or its name on the Hub"
    add("--hf-path", type=Path, metavar="DIR", help=path)
    add("--num-new-experts", type=_count, metavar="EXPERTS", help="with --hf-path: new experts per MoE layer")
    add_expert_flags(parser)
    add("--num-new-tokens", type=_count, metavar="NEW", help="with --hf-path: rows of new tokens")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    run_command(main)
