"""torchrun that exits as the trainer does: with its exit code, and without a launcher traceback.

    python -m moelpr.torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 …

takes every option of torchrun. Plain `torchrun` works too, but then a wrong argument ends in twenty lines of traceback
and exit code 1 instead of one message and exit code 2, a run that SIGTERM stops cleanly exits with code 1, SIGUSR1
kills the launcher, and a missing node or an occupied port blocks for ten minutes or indefinitely
(moelpr/node_preflight.py).
"""

import logging
import signal
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

from moelpr.errors import run_command
from moelpr.node_preflight import JOIN_TIMEOUT_S, node_preflight


def main() -> None:
    # The ranks inherit this, so that a SIGUSR1 to all processes of a job spares those that have no handler yet.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    run_command(wait_for_nodes)
    signal.signal(signal.SIGTERM, forward_signal)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        # Not SIGTERM: torchrun would exit with an error even if the ranks stop cleanly.
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as failure:
        first = min(failure.failures.values(), key=lambda one: one.timestamp)
        if first.exitcode not in (1, 2):
            print(f"torchrun: rank {failure.get_first_failure()[0]} exited with code {first.exitcode}", file=sys.stderr)
        sys.exit(first.exitcode if first.exitcode > 0 else 1)


def wait_for_nodes() -> None:
    """Run the preflight if the nodes are given; nodes of other rendezvous backends (--standalone) find each other."""
    args = parse_args(sys.argv[1:])
    if args.standalone or args.rdzv_backend != "static" or (args.master_port is None and args.nnodes == "1"):
        return
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or 29500}"
    settings = dict(pair.split("=", 1) for pair in args.rdzv_conf.split(",") if "=" in pair)
    address, port = parse_rendezvous_endpoint(endpoint, 29500)
    timeout_s = float(settings.get("timeout", JOIN_TIMEOUT_S))
    node_preflight(int(args.nnodes), args.node_rank, address, port, timeout_s)


def forward_signal(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the ranks, which run in sessions of their own; exit at once if there are none."""
    ranks = psutil.Process().children()
    if not ranks:
        sys.exit(128 + number)
    for rank in ranks:
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    main()
