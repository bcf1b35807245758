"""torchrun that ends as the trainer ended: with its exit code, and no launcher traceback behind the trainer's words.

    python -m moelpr.torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 …

takes every option of torchrun. With the plain `torchrun` everything works too, but a wrong argument ends in twenty
lines of launcher traceback and exit code 1 instead of one sentence and exit code 2.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> None:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as failure:
        first = min(failure.failures.values(), key=lambda one: one.timestamp)
        if first.exitcode not in (1, 2):
            print(f"torchrun: rank {failure.get_first_failure()[0]} ended with code {first.exitcode}", file=sys.stderr)
        sys.exit(first.exitcode if first.exitcode > 0 else 1)


if __name__ == "__main__":
    main()
