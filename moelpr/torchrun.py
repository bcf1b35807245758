"""torchrun that ends as the trainer ended: with its exit code, and no launcher traceback behind the trainer's words.

    python -m moelpr.torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 …

takes every option of torchrun. With the plain `torchrun` everything works too, but a wrong argument ends in twenty
lines of launcher traceback and exit code 1 instead of one sentence and exit code 2, a run that stops cleanly on SIGTERM
ends with code 1, and SIGUSR1 kills the launcher.
"""

import logging
import os
import signal
import sys
import threading
from types import FrameType

import psutil

# A node that is dead at start is waited for this long; torchrun's own time is ten minutes.
JOIN_TIMEOUT_S = int(os.environ.get("MOELPR_JOIN_TIMEOUT_S", "50"))


def main() -> None:
    # The ranks inherit this, so that a SIGUSR1 to the whole process group waits until they have their own handler.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _pass_on)
    os.environ.setdefault("PET_RDZV_CONF", f"timeout={JOIN_TIMEOUT_S}")
    # Node 0 keeps to that; the others would go on trying to reach it.
    watch = threading.Timer(JOIN_TIMEOUT_S + 5, _give_up_without_ranks)
    watch.daemon = True
    watch.start()

    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # Not SIGTERM, which torchrun answers by ending with an error, whatever the ranks make of it.
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as failure:
        first = min(failure.failures.values(), key=lambda one: one.timestamp)
        if first.exitcode not in (1, 2):
            print(f"torchrun: rank {failure.get_first_failure()[0]} ended with code {first.exitcode}", file=sys.stderr)
        sys.exit(first.exitcode if first.exitcode > 0 else 1)
    except (DistNetworkError, DistStoreError) as error:
        _tell_why_the_nodes_did_not_meet(str(error))
        sys.exit(1)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """To the ranks, each a session of its own; they decide how to end, and the launcher ends as they do."""
    for rank in psutil.Process().children():
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _give_up_without_ranks() -> None:
    if not psutil.Process().children():
        _tell_why_the_nodes_did_not_meet(f"no answer from {os.environ.get('MASTER_ADDR', 'node 0')}")
        os._exit(1)  # the main thread is inside a call that nothing ends


def _tell_why_the_nodes_did_not_meet(error: str) -> None:
    if "EADDRINUSE" in error or "address already in use" in error:
        why = (
            "the port that the nodes meet at is taken by another program on this node; set MASTER_PORT to a free one, "
            "the same on all nodes"
        )
    else:
        why = (
            f"not all nodes came together within {JOIN_TIMEOUT_S} s ({error.splitlines()[0].strip(' .')}); start the "
            "same command on every node, with the same NNODES, MASTER_ADDR and MASTER_PORT and each with its NODE_RANK"
        )
    print(f"torchrun: error: {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
