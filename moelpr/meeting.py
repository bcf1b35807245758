"""All nodes of a run meet at node 0 before torchrun starts, so that who is missing is said in a sentence.

torchrun alone waits ten minutes for a missing node and then prints a page of C++ frames; where another program listens
on the port, it never returns. A meeting is one connection per node: the node says its number and of how many, node 0
says `here` at once, and `go` to all when the last has come. Then the port is torchrun's.
"""

import os
import re
import socket
import time
from contextlib import ExitStack, suppress

from moelpr.errors import UserError

PATIENCE_S = 45.0  # with the start of Python around it, a missing node is known within a minute
_HERE, _GO, _STOP = b"here\n", b"go\n", b"stop\n"
_ANSWER_S = 5.0  # what talks to us and is slower than this is no node
_GIVE_TIME = "or give the nodes more time with --join-timeout SECONDS"


def meet(nnodes: int, node_rank: int, address: str, port: int, patience_s: float = PATIENCE_S) -> None:
    """Return once every node is there.

    Raises:
        UserError: some node is missing, the port is taken, or the nodes contradict each other.
    """
    if node_rank == 0:
        _wait_for_the_others(nnodes, address, port, patience_s)
    else:
        _go_to_node_0(nnodes, node_rank, address, port, patience_s)


def _wait_for_the_others(nnodes: int, address: str, port: int, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    arrived: dict[int, socket.socket] = {}
    complaint = None
    with ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        stack.enter_context(_call_oneself(nnodes, address, port))
        while complaint is None and len(arrived) < nnodes:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                peer = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [rank for rank in range(nnodes) if rank not in arrived or _has_left(arrived[rank])]
                complaint = _who_is_missing(missing, nnodes, address, port, patience_s)
                break
            if (greeting := _hear(peer)) is None:
                continue
            rank, theirs = greeting
            arrived = {other: waiting for other, waiting in arrived.items() if not _has_left(waiting)}
            if theirs != nnodes:
                complaint = (
                    f"node {rank} was started with --nnodes {theirs} and node 0 with {nnodes}; give all the same"
                )
            elif rank in arrived:
                complaint = f"two nodes were started with --node-rank {rank}; give each its own, 0 to {nnodes - 1}"
            arrived.setdefault(rank, peer)
        server.close()  # before the answer, so that a node's torchrun finds torchrun here
        for peer in arrived.values():
            with suppress(OSError):  # who leaves only now is missed by torchrun
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
            f"port {port} of node 0 can't be had ({os.strerror(error.errno or 0)}), most likely another run has it; "
            "give all nodes another --master-port, or end that run"
        ) from error


def _call_oneself(nnodes: int, address: str, port: int) -> socket.socket:
    """As torchrun's own store on node 0 does: the name that all nodes were given must lead here."""
    try:
        return _call(address, port, nnodes, 0)
    except OSError as error:
        raise UserError(
            f"node 0 can't reach itself at --master-addr {address} ({_reason(error)}); give all nodes a name or "
            "address of node 0"
        ) from error


def _call(address: str, port: int, nnodes: int, node_rank: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_ANSWER_S)
    connection.sendall(f"node {node_rank} of {nnodes}\n".encode())
    return connection


def _hear(peer: socket.socket) -> tuple[int, int] | None:
    """Number of the node that called and how many it counts; None where it was something else."""
    peer.settimeout(_ANSWER_S)
    try:
        words = re.fullmatch(rb"node (\d+) of (\d+)\n", peer.recv(64))
        peer.sendall(_HERE)
    except OSError:
        return None
    return (int(words[1]), int(words[2])) if words else None


def _has_left(waiting: socket.socket) -> bool:
    """True where a node has been ended since it called; it sends nothing more while it waits."""
    waiting.setblocking(False)
    try:
        return waiting.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _go_to_node_0(nnodes: int, node_rank: int, address: str, port: int, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with _call(address, port, nnodes, node_rank) as connection, connection.makefile("rb") as lines:
                if lines.readline() != _HERE:
                    raise ConnectionError("something else listens there")
                connection.settimeout(patience_s + _ANSWER_S)  # node 0 may have started later than this node
                if lines.readline() == _GO:
                    return
                raise UserError(f"node {node_rank} stops because node 0 does, which says why")
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"node 0 does not answer at {address} port {port} within {patience_s:g} s ({_reason(error)}); "
                    f"start it, check --master-addr and --master-port of node {node_rank}, {_GIVE_TIME}"
                ) from error
        time.sleep(0.5)


def _who_is_missing(missing: list[int], nnodes: int, address: str, port: int, patience_s: float) -> str:
    names = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    return (
        f"{names} of {nnodes} did not come to {address} port {port} within {patience_s:g} s; start the same command "
        f"there with its own --node-rank, check that it reaches this port, {_GIVE_TIME}"
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
