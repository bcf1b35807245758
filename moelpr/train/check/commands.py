"""Run a stage's command line without a GPU, as the first, a middle and the last rank of its cluster.

    moelpr check stage1 --nnodes 128 --nproc-per-node 8 --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX …

takes the very command line of a stage, and starts the real trainer on tensors without values. What a start on the
cluster would refuse is refused with the same message. A checkpoint that is not here needs only its model_spec.json, or
--hf-path and --num-new-experts; corpora may be missing. docs/design/planner.md says what a dry run can't see.
"""

import json
import os
import sys
from typing import Annotated

from moelpr.base.errors import UserError
from moelpr.base.settings import POSITIONAL, Count, Folder, choices, flags_of, parse
from moelpr.model.families.families import read_base
from moelpr.model.families.hub import config_folder
from moelpr.model.families.new_experts import with_new_experts
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES, Stage
from moelpr.plan.gpus import GPUS
from moelpr.plan.settings import ExpertFlags
from moelpr.train.arguments.early import check_start
from moelpr.train.check.whole_run import check, prepare

# Options of the launcher that change nothing here.
_IGNORED = ("--node-rank", "--master-addr", "--master-port", "--join-timeout")


class Settings(ExpertFlags):
    stage: Annotated[Stage, POSITIONAL]  # the stage; all flags of its launcher may follow
    nnodes: Count = 1  # number of nodes
    nproc_per_node: Count = 8  # GPUs per node
    gpu: Annotated[str, choices(GPUS)] = "h100-80"  # the GPUs
    json: bool = False  # print JSON (bytes, launches, FLOPs, seconds) instead of tables
    hf_path: Folder | None = None  # base of a checkpoint that is not here: directory or name on the Hub
    num_new_experts: Count | None = None  # with --hf-path: new experts per MoE layer
    num_new_tokens: Count | None = None  # with --hf-path: rows of new tokens
    # options of the launcher that change nothing here: --node-rank, --master-addr, --master-port, --join-timeout
    ignored: Annotated[str | None, {"names": _IGNORED}] = None


def main() -> None:
    """Read the command line itself, as the trainer's flags are on it too."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    own, trainers = _split(sys.argv[1:])
    args = parse(Settings, own, __doc__)
    check_start(args.stage, trainers, needs_checkpoint=False)
    spec = _upcycled(args)
    prepare(args.gpu, args.nproc_per_node)
    outcome = check(["--stage", args.stage, *trainers], args.nnodes, args.nproc_per_node, lambda: spec)
    from moelpr.train.check import tables  # only now, as it imports torch

    for note in outcome.notes:
        print(note, file=sys.stderr)
    if args.json:
        print(json.dumps(tables.numbers(outcome, args.nproc_per_node), indent=2))
    else:
        print(tables.report(outcome, GPUS[args.gpu], args.nproc_per_node))


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words for this command's own flags, and the trainer's."""
    from moelpr.train.arguments.flags import split_by_flags

    flags = {f"--{flag}" for flag in flags_of(Settings)}
    dashed = [
        word.replace("_", "-") if word.startswith("--") and word.split("=")[0].replace("_", "-") in flags else word
        for word in words
    ]
    own, trainers = split_by_flags(dashed[1:], flags)
    return dashed[:1] + own, trainers


def _upcycled(args: Settings) -> ModelSpec | None:
    """The model that --hf-path and the flags for experts describe."""
    if args.hf_path is None:
        return None
    family, base = read_base(config_folder(args.hf_path))
    spec = base
    if args.stage not in DENSE_STAGES:
        if args.num_new_experts is None:
            raise UserError(f"--hf-path requires new experts for {args.stage}; pass --num-new-experts N")
        spec = with_new_experts(family, base, args.experts(args.num_new_experts, base))
    return spec.with_new_tokens(base.megatron_args["vocab_size"], args.num_new_tokens) if args.num_new_tokens else spec
