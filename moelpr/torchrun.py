"""torchrun that exits as the trainer does: with its exit code, and without a launcher traceback.

    python -m moelpr.torchrun --nproc-per-node 8 -m moelpr.pretrain --stage stage1 …

takes every option of torchrun. Plain `torchrun` works too, but then a wrong argument ends in twenty lines of traceback
and exit code 1 instead of one message and exit code 2, a run that SIGTERM stops cleanly exits with code 1, SIGUSR1
kills the launcher, a killed rank is reported by a C++ traceback of another one, and a missing node or an occupied port
blocks for ten minutes or indefinitely (moelpr/base/node_preflight.py).
"""

import argparse
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import psutil
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import determine_local_world_size, parse_args
from torch.distributed.run import main as torchrun

from moelpr.base import machine
from moelpr.base.command import run_command, stopped_code
from moelpr.base.errors import taken_port
from moelpr.base.files import temporary_folder
from moelpr.base.node_preflight import CHECK_S, JOIN_TIMEOUT_S, node_preflight, problem_of_this_node
from moelpr.base.stop import LAUNCHER_VARIABLE, STOPPED_SIGNAL


def main() -> None:
    # The ranks inherit this, so that a SIGUSR1 to all processes of a job spares those that have no handler yet.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ["PYTHONSAFEPATH"] = "1"  # the ranks import nothing from the current folder
    args = parse_args(sys.argv[1:])
    run_command(lambda: wait_for_nodes(args))
    with suppress(ValueError, RuntimeError):  # torchrun reports a wrong number
        machine.share_threads(determine_local_world_size(args.nproc_per_node))
    signal.signal(signal.SIGTERM, forward_signal)
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    with temporary_folder("torchelastic") as logs:  # torchrun makes one even where it writes no logs, and leaves it
        launch(args, ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", "--log-dir", str(logs), *sys.argv[1:]])


def launch(args: argparse.Namespace, words: list[str]) -> None:
    stopped: list[int] = []  # an Event would wait for its own lock if one signal interrupts another
    signal.signal(STOPPED_SIGNAL, lambda number, _: stopped.append(number))
    try:
        # Not SIGTERM: torchrun would exit with an error even if the ranks stop cleanly.
        torchrun(words)
    except RuntimeError as error:
        if (problem := taken_port(error)) is None:
            raise
        fail(problem)
    except SignalException as received:
        number = signal.Signals(received.sigval)
        fail("interrupted" if number == signal.SIGINT else f"ended by {number.name}")
    except ChildFailedError as failure:
        # Times are full seconds; torchrun kills the other ranks only half a minute after the first failure.
        rank, first = min(
            failure.failures.items(), key=lambda one: (one[1].timestamp, one[1].exitcode != -signal.SIGKILL)
        )
        if first.exitcode == -signal.SIGKILL:
            fail(killed(rank, args))
        ended_by = -first.exitcode if first.exitcode < 0 else first.exitcode - 128  # as a shell reports it
        if ended_by in signal.valid_signals():
            fail(f"rank {rank} was ended by {signal.Signals(ended_by).name}")
        if first.exitcode > 2:
            fail(f"rank {rank} exited with code {first.exitcode}", first.exitcode)
        sys.exit(first.exitcode)
    if stopped:
        sys.exit(stopped_code())


def fail(message: str, code: int = 1) -> NoReturn:
    with suppress(OSError):  # stderr may be a pipe that its reader has closed
        print(f"torchrun: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def wait_for_nodes(args: argparse.Namespace) -> None:
    """Run the preflight if the nodes are given; nodes of other rendezvous backends (--standalone) find each other."""
    if args.standalone or args.rdzv_backend != "static" or (args.master_port is None and args.nnodes == "1"):
        return
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or 29500}"
    settings = dict(pair.split("=", 1) for pair in args.rdzv_conf.split(",") if "=" in pair)
    address, port = parse_rendezvous_endpoint(endpoint, 29500)
    timeout_s, nnodes, problem = float(settings.get("timeout", JOIN_TIMEOUT_S)), int(args.nnodes.split(":")[-1]), ""
    if nnodes > 1 and torch.cuda.device_count():
        problem, timeout_s = problem_of_this_node(determine_local_world_size(args.nproc_per_node)), timeout_s + CHECK_S
    node_preflight(nnodes, args.node_rank, address, port, timeout_s, problem)


def forward_signal(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the ranks, which run in sessions of their own; exit at once if there are none."""
    ranks = psutil.Process().children()
    if not ranks:
        sys.exit(128 + number)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def killed(rank: int, args: argparse.Namespace) -> str:
    """The message about a rank that was killed, most likely for lack of memory."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the largest rank: all have ended
    ranks = determine_local_world_size(args.nproc_per_node)
    whose = f"{ranks} ranks of this machine share" if ranks > 1 else "this machine has"
    return (
        f"rank {rank} was killed (signal 9), most likely for lack of memory: up to {machine.format_bytes(peak)} each, "
        f"{whose} {machine.format_bytes(machine.total_memory())}; run the same command again to resume, and if it is "
        "killed again, use fewer ranks or a smaller --micro-batch-size"
    )


if __name__ == "__main__":
    main()
