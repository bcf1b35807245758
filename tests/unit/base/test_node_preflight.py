"""Nodes wait for each other before torchrun starts, but not indefinitely; a missing or wrong node is named."""

import socket
import threading
import time

import psutil
import pytest

from moelpr.base.errors import UserError
from moelpr.base.node_preflight import node_preflight, problem_of_this_node
from tests.support.limits import PROCESS_S

HOST = "127.0.0.1"


def errors_of(*nodes: tuple, port: int, timeout_s: float = 2, apart_s: float = 0) -> list[str]:
    """The error of each node (its --nnodes, its rank, its problem), in order; "" if it has none."""
    errors = ["still waiting"] * len(nodes)

    def start(place: int, nnodes: int, rank: int, problem: str = "") -> None:
        try:
            node_preflight(nnodes, rank, HOST, port, timeout_s, problem)
            errors[place] = ""
        except UserError as error:
            errors[place] = str(error)

    threads = [threading.Thread(target=start, args=(place, *node), daemon=True) for place, node in enumerate(nodes)]
    for thread in threads:
        thread.start()
        time.sleep(apart_s)
    for thread in threads:
        thread.join(timeout=30)
    return errors


def test_nodes_proceed_in_whatever_order_they_arrive_and_leave_the_port_to_torchrun(port: int) -> None:
    assert errors_of((3, 2), (3, 1), (3, 0), port=port, apart_s=0.3, timeout_s=5) == ["", "", ""]
    socket.create_server((HOST, port)).close()


def test_node_0_names_the_missing_nodes_and_the_others_abort_with_it(port: int) -> None:
    start = time.monotonic()
    node_0, node_2 = errors_of((4, 0), (4, 2), port=port)
    assert time.monotonic() - start < 15
    assert node_0.startswith(f"nodes 1, 3 of 4 did not connect to {HOST} port {port} within 2 s")
    assert "--node-rank" in node_0 and "--join-timeout" in node_0
    assert node_2.startswith("node 2 aborted") and "node 0" in node_2


@pytest.mark.parametrize(("kind", "reason"), [("port", "Connection refused"), ("taken_port", "timed out")])
def test_without_node_0_the_others_name_it(request: pytest.FixtureRequest, kind: str, reason: str) -> None:
    """A program that is not a node does not block a node either."""
    (error,) = errors_of((2, 1), port=(port := request.getfixturevalue(kind)), timeout_s=1)
    assert error.startswith(f"node 0 does not answer at {HOST} port {port} within 1 s ({reason})")
    assert "--master-addr" in error and "--master-port" in error


def test_a_stranger_on_the_port_is_not_counted(port: int) -> None:
    send(b"GET / HTTP/1.1\r\n\r\n", port)
    assert errors_of((2, 0), port=port, timeout_s=1)[0].startswith("node 1 of 2 did not connect")


@pytest.mark.parametrize(
    ("nodes", "named"),
    [(((2, 0), (3, 1)), ("node 1 ", "--nnodes 3", "--nnodes 2")), (((3, 0), (3, 1), (3, 1)), ("--node-rank 1",))],
)
def test_nodes_with_different_numbers_or_the_same_rank_are_named(port: int, nodes: tuple, named: tuple) -> None:
    node_0, node_1, *_ = errors_of(*nodes, port=port)
    assert all(word in node_0 for word in named) and node_1.startswith("node 1 aborted")


def test_a_restarted_node_does_not_count_twice_and_one_that_disconnects_is_missing(port: int) -> None:
    send(b"node 1 of 3\n", port)
    assert errors_of((3, 0), (3, 1), (3, 2), port=port, apart_s=1, timeout_s=5) == ["", "", ""]
    send(b"node 1 of 3\n", port)
    assert errors_of((3, 0), port=port)[0].startswith("nodes 1, 2 of 3 did not connect")


def send(greeting: bytes, port: int) -> None:
    """Connect in a moment, and leave after the answer."""

    def come() -> None:
        time.sleep(0.3)
        with socket.create_connection((HOST, port)) as node:
            node.sendall(greeting)
            node.recv(5)

    threading.Thread(target=come, daemon=True).start()


def test_a_node_that_fails_its_check_is_named_by_node_0_also_if_it_is_node_0(port: int) -> None:
    wrong = "GPU 3 of host7: links wrong"
    for bad in (0, 1):
        node_0, node_1 = errors_of((2, 0, wrong * (bad == 0)), (2, 1, wrong * (bad == 1)), port=port)
        assert f"fails on node {bad} ({wrong})" in node_0
        assert node_1.startswith("node 1 aborted")


def test_a_node_whose_test_fails_or_hangs_has_a_problem_and_slow_ranks_are_printed(capfd) -> None:
    slow = "import logging; logging.warning('  OUTLIER rank 1 (vm): 3.00 (-50%)')"
    assert problem_of_this_node(2, slow, PROCESS_S) == "" and "OUTLIER rank 1" in capfd.readouterr().err
    hanging = "from moelpr.base import stop; stop.kill_with_parent(); import time; time.sleep(99)"
    assert "not done in 9 s" in problem_of_this_node(1, hanging, 9)
    deadline = time.monotonic() + PROCESS_S
    while any(hanging in (one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert problem_of_this_node(1, limit_s=PROCESS_S) and "nccl" in capfd.readouterr().err.lower()  # Megatron's starts


def test_node_0_must_be_reachable_at_the_given_address(port: int) -> None:
    with pytest.raises(UserError, match="node 0 .*--master-addr no-such-host.invalid"):
        node_preflight(2, 0, "no-such-host.invalid", port)
