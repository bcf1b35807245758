"""torchrun that ends as the trainer ended: with its exit code, and no launcher traceback behind the trainer's words.

    python -m moelpr.torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 …

takes every option of torchrun. With the plain `torchrun` everything works too, but a wrong argument ends in twenty
lines of launcher traceback and exit code 1 instead of one sentence and exit code 2, a run that SIGTERM stops cleanly
ends with code 1, SIGUSR1 kills the launcher, and a missing node or an occupied port is waited for ten minutes or for
ever (moelpr/meeting.py).
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
from moelpr.meeting import PATIENCE_S, meet


def main() -> None:
    # The ranks inherit this, so that a SIGUSR1 to every process of a job spares those that can't listen yet.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    run_command(meet_the_other_nodes)
    signal.signal(signal.SIGTERM, pass_on)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        # Not SIGTERM, which torchrun answers by ending with an error, whatever the ranks make of it.
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
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


def pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to the ranks, each a session of its own; the launcher ends as they do, or at once without any."""
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
