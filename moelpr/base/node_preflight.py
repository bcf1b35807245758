"""Wait for all nodes of a run before torchrun starts, so that a missing node is reported in one message.

torchrun waits ten minutes for a missing node and then prints a page of C++ frames; if another program listens on the
port, it never returns. In the preflight, each node tests its GPUs, connects to node 0 and sends its rank, the number of
nodes and what failed. Node 0 answers `here` at once, and `go` to all once the last has arrived and the port is free.
"""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from tempfile import TemporaryFile

from moelpr.base.errors import UserError

JOIN_TIMEOUT_S = 45.0  # including Python's start, a missing node is reported within a minute
_HERE, _GO, _STOP = b"here\n", b"go\n", b"stop\n"
_REPLY_TIMEOUT_S = 5.0  # a slower peer is not a node
CHECK_S = 60.0
_CHECK = (
    "from moelpr.base import stop; stop.kill_with_parent(); from megatron.training.gpu_sniff_test import main; main()"
)


def problem_of_this_node(ranks: int, check: str = _CHECK, limit_s: float = CHECK_S) -> str:
    """How Megatron's test of products, links and an all-reduce fails on this node's GPUs; "" if it passes."""
    words = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --no-python {sys.executable} -c".split()
    words, code = [sys.executable, *words, check, "--ep-size", "1"], None
    with TemporaryFile("w+") as output:  # not a pipe, which a rank that can't be killed would keep open
        with suppress(subprocess.TimeoutExpired):
            code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s).returncode
        output.seek(0)
        sys.stderr.writelines(line for line in output if code != 0 or "OUTLIER rank" in line)  # a slow GPU
    why = f"not done in {limit_s:g} s" if code is None else f"exit code {code}, see its log"
    return "" if code == 0 else f"{socket.gethostname()}, test of products, links and all-reduce: {why}"


def node_preflight(
    nnodes: int, node_rank: int, address: str, port: int, timeout_s: float = JOIN_TIMEOUT_S, problem: str = ""
) -> None:
    """Return once all `nnodes` nodes have arrived at `address` and `port` of node 0, a free port.

    Raises:
        UserError: a node is missing or has a `problem`, the port is taken, or the nodes' arguments differ.
    """
    if node_rank == 0:
        _wait_for_nodes(nnodes, address, port, timeout_s, problem)
    else:
        _join_node_0(nnodes, node_rank, address, port, timeout_s, problem)


def _wait_for_nodes(nnodes: int, address: str, port: int, timeout_s: float, problem: str) -> None:
    deadline = time.monotonic() + timeout_s
    arrived: dict[int, socket.socket] = {}
    complaint, bad = None, []
    with ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        try:  # the address that all nodes were given must be node 0's, as torchrun's store on node 0 expects
            stack.enter_context(_connect(address, port, nnodes, 0, problem))
        except OSError as error:
            raise UserError(
                f"node 0 can't reach itself at --master-addr {address} ({_reason(error)}); pass a name or address of "
                "node 0 to all nodes"
            ) from error
        while complaint is None and len(arrived) < nnodes:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                peer = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [rank for rank in range(nnodes) if rank not in arrived or _has_left(arrived[rank])]
                names = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                complaint = (
                    f"{names} of {nnodes} did not connect to {address} port {port} within {timeout_s:g} s; run the "
                    "same command there with its own --node-rank, check that it can reach this port, or pass a larger "
                    "--join-timeout"
                )
                break
            if (greeting := _receive_greeting(peer)) is None:
                continue
            rank, peer_nnodes, peer_problem = greeting
            arrived = {other: waiting for other, waiting in arrived.items() if not _has_left(waiting)}
            if peer_nnodes != nnodes:
                complaint = (
                    f"node {rank} was started with --nnodes {peer_nnodes} but node 0 with --nnodes {nnodes}; pass the "
                    "same number to all nodes"
                )
            elif rank in arrived:
                complaint = f"two nodes were started with --node-rank {rank}; pass each its own, 0 to {nnodes - 1}"
            arrived.setdefault(rank, peer)
            bad += [f"node {rank} ({peer_problem})"] * bool(peer_problem)
        if complaint is None and bad:
            complaint = f"the check before a run fails on {', '.join(bad)}; take it out of the job"
        server.close()  # before the answer, so that the nodes find torchrun on this port next
        for peer in arrived.values():
            with suppress(OSError):  # torchrun reports a node that leaves now
                peer.sendall(_STOP if complaint else _GO)
    if complaint:
        raise UserError(complaint)


def _listen(port: int) -> socket.socket:
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=is_dual, backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of node 0 is unavailable ({os.strerror(error.errno or 0)}), probably because of another run; "
            "pass another --master-port to all nodes, or end that run"
        ) from error


def _connect(address: str, port: int, nnodes: int, node_rank: int, problem: str) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_REPLY_TIMEOUT_S)
    connection.sendall(f"node {node_rank} of {nnodes}{problem and f': {problem}'}\n".encode())
    return connection


def _receive_greeting(peer: socket.socket) -> tuple[int, int, str] | None:
    """The peer's node rank, number of nodes, and problem; None if it is not a node."""
    peer.settimeout(_REPLY_TIMEOUT_S)
    try:
        greeting = re.fullmatch(rb"node (\d+) of (\d+)(?:: (.+))?\n", peer.recv(512))
        peer.sendall(_HERE)
    except OSError:
        return None
    return (int(greeting[1]), int(greeting[2]), (greeting[3] or b"").decode()) if greeting else None


def _has_left(waiting: socket.socket) -> bool:
    """True if a node has ended since it connected; a waiting node sends nothing more."""
    waiting.setblocking(False)
    try:
        return waiting.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _join_node_0(nnodes: int, node_rank: int, address: str, port: int, timeout_s: float, problem: str) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with _connect(address, port, nnodes, node_rank, problem) as connection, connection.makefile("rb") as lines:
                if lines.readline() != _HERE:
                    raise ConnectionError("another program listens there")
                connection.settimeout(timeout_s + _REPLY_TIMEOUT_S)  # node 0 may have started later than this node
                if lines.readline() == _GO:
                    return
                raise UserError(f"node {node_rank} aborted because node 0 failed; see node 0's log")
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"node 0 does not answer at {address} port {port} within {timeout_s:g} s ({_reason(error)}); start "
                    f"it, check --master-addr and --master-port of node {node_rank}, or pass a larger --join-timeout"
                ) from error
        time.sleep(0.5)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
