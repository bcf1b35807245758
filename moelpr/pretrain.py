"""Entry point of every rank: one process per GPU, or per CPU rank.

    torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 --recipe launch/recipes/paper-stage1.yaml \\
        --pretrained-checkpoint upcycled --data-path corpus_text_document --save runs/stage1

Rerun the same command to resume a killed run from its last checkpoint. A run that is asked to stop (SIGUSR1, SIGTERM or
a file STOP in --save) saves and exits with code 75. --load and --finetune say where to start, so omit them to resume.

The steps are in moelpr/train/train.py. This file stays light because helper processes of Megatron's checkpoint
writer import it again.
"""

import sys
import warnings

from moelpr.base import stop
from moelpr.base.command import run_command
from moelpr.train.clean_stop import StopRequest


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        from moelpr.train.arguments.flags import own_arguments

        own_arguments().print_help()
        return
    if "--stage" in sys.argv[:-1]:  # the command that errors are signed with
        sys.argv[0] = f"moelpr train {sys.argv[sys.argv.index('--stage') + 1]}"
    stop.end_with_launcher()
    request = StopRequest()
    request.listen()
    stop.watch_over_helpers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # imports warn about optional packages
        from moelpr.model.megatron import bootstrap

        bootstrap.install_patches()
        from moelpr.train.train import train

    with request.leaves_lost_ranks_to_launcher():
        is_complete = train(sys.argv[1:], request)

    import torch

    if torch.distributed.is_initialized():  # False if the run had finished before
        torch.distributed.destroy_process_group()
    if not is_complete:
        stop.exit_before_the_last_step()


if __name__ == "__main__":
    run_command(main)
elif __name__ == "__mp_main__":
    stop.become_helper()
