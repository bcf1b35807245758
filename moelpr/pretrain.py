"""Both stages' entry, one process per GPU (or CPU rank).

    torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 --recipe launch/recipes/paper-stage1.yaml \\
        --pretrained-checkpoint upcycled --data-path corpus_text_document --save runs/stage1

A run that was killed goes on where its last checkpoint stands when the same command is given again; one that is asked
to stop (SIGUSR1, SIGTERM or a file STOP in --save) saves before it ends. (With --load or --finetune a command says
where to start, so to resume such a run, drop them.)
What happens is told in moelpr/training/train.py; this file stays light because Megatron's checkpoint writer starts
helper processes that import it again.
"""

import sys

from moelpr.errors import run_command
from moelpr.training import clean_stop


def main() -> None:
    stop = clean_stop.StopRequest()
    stop.listen()
    clean_stop.watch_over_helpers()
    from moelpr.megatron_patches import cpu, megatron_fixes

    cpu.install()  # before Megatron is imported; does nothing where a GPU is present
    megatron_fixes.install()
    from moelpr.training.train import train

    train(sys.argv[1:], stop)

    import torch

    if torch.distributed.is_initialized():  # False where the run was finished before
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
elif __name__ == "__mp_main__":
    clean_stop.become_helper()
