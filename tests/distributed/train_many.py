"""Trains several times in the same ranks, which saves about 10 s of start-up each; run under torchrun.

    python -m moelpr.torchrun --standalone --nproc-per-node 2 -m tests.distributed.train_many FILE

FILE contains a JSON list of argument lists of moelpr.pretrain.
"""

import gc
import json
import os
import sys
from pathlib import Path

from benchmarks.common import install_megatron


def main() -> None:
    install_megatron()
    import torch
    from megatron.training.training import destroy_global_state

    from moelpr.model.megatron import bootstrap
    from moelpr.train.train import train

    bootstrap.connect_ranks()
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        print(f"rank {os.environ['RANK']}: {' '.join(arguments)}", flush=True)
        try:
            train(arguments)
        except SystemExit as end:  # how Megatron ends after --exit-interval
            if end.code:
                raise
        torch.distributed.barrier()  # rank 0 may still write what the next training reads, or use a group
        destroy_global_state()
        free_groups()
    torch.distributed.destroy_process_group()


def free_groups() -> None:
    """End the threads of the last training's process groups, each of which polls a hundred times a second."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is not distributed_c10d.GroupMember.WORLD:
            distributed_c10d.destroy_process_group(group)
    gc.collect()


if __name__ == "__main__":
    main()
