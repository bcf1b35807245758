"""Trains several times in the same ranks, which saves about 10 s of start-up each; run under torchrun.

    python -m moelpr.torchrun --standalone --nproc-per-node 2 -m tests.distributed.train_many FILE

FILE contains a JSON list of argument lists of moelpr.pretrain.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.common import install_megatron


def main() -> None:
    install_megatron()
    import torch
    from megatron.training.training import destroy_global_state

    from moelpr.megatron_patches import bootstrap
    from moelpr.training.train import train

    bootstrap.connect_ranks()
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        print(f"rank {os.environ['RANK']}: {' '.join(arguments)}", flush=True)
        try:
            train(arguments)
        except SystemExit as end:  # how Megatron ends after --exit-interval
            if end.code:
                raise
        destroy_global_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
