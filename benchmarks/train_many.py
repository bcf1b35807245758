"""Runs one training after the other in the same ranks, which saves a start of some 10 s for each; under torchrun.

    python -m moelpr.torchrun --standalone --nproc-per-node 2 -m benchmarks.train_many FILE

FILE holds a JSON list of the trainer's command lines.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    from moelpr.megatron_patches import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    import torch
    from megatron.training.training import destroy_global_state

    from moelpr.training.train import train

    torch.distributed.init_process_group("gloo" if cpu.is_needed() else "nccl")
    for command in json.loads(Path(sys.argv[1]).read_text()):
        print(f"rank {os.environ['RANK']}: {' '.join(command)}", flush=True)
        try:
            train(command)
        except SystemExit as end:  # Megatron's way out after --exit-interval
            if end.code:
                raise
        destroy_global_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
