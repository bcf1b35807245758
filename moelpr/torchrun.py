"""torchrun that ends as the trainer ended: with its exit code, and no launcher traceback behind the trainer's words.

    python -m moelpr.torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 …

takes every option of torchrun. With the plain `torchrun` everything works too, but a wrong argument ends in twenty
lines of launcher traceback and exit code 1 instead of one sentence and exit code 2, and a missing node or an occupied
port in a wait of ten minutes or for ever (moelpr/meeting.py).
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

from moelpr.errors import run_command
from moelpr.meeting import PATIENCE_S, meet


def main() -> None:
    run_command(meet_the_other_nodes)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as failure:
        first = min(failure.failures.values(), key=lambda one: one.timestamp)
        if first.exitcode not in (1, 2):
            print(f"torchrun: rank {failure.get_first_failure()[0]} ended with code {first.exitcode}", file=sys.stderr)
        sys.exit(first.exitcode if first.exitcode > 0 else 1)


def meet_the_other_nodes() -> None:
    """Where torchrun was told who they are; its other backends, as --standalone uses one, find each other."""
    args = parse_args(sys.argv[1:])
    if args.standalone or args.rdzv_backend != "static" or (args.master_port is None and args.nnodes == "1"):
        return
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or 29500}"
    settings = dict(pair.split("=", 1) for pair in args.rdzv_conf.split(",") if "=" in pair)
    address, port = parse_rendezvous_endpoint(endpoint, 29500)
    meet(int(args.nnodes), args.node_rank, address, port, float(settings.get("timeout", PATIENCE_S)))


if __name__ == "__main__":
    main()
