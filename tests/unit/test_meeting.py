"""Nodes meet before torchrun starts; whoever is missing or wrong is named, and no node waits for ever."""

import socket
import threading
import time

import pytest

from moelpr.errors import UserError
from moelpr.meeting import meet

HOST = "127.0.0.1"


def told(*nodes: tuple, port: int, patience_s: float = 2, apart_s: float = 0) -> list[str]:
    """What each node (its --nnodes, its rank) is told, in order; "" where all is well."""
    said = ["still waiting"] * len(nodes)

    def start(place: int, nnodes: int, rank: int) -> None:
        try:
            meet(nnodes, rank, HOST, port, patience_s)
            said[place] = ""
        except UserError as error:
            said[place] = str(error)

    threads = [threading.Thread(target=start, args=(place, *node), daemon=True) for place, node in enumerate(nodes)]
    for thread in threads:
        thread.start()
        time.sleep(apart_s)
    for thread in threads:
        thread.join(timeout=30)
    return said


def test_nodes_that_all_come_go_on_in_whatever_order_they_came(port: int) -> None:
    assert told((3, 2), (3, 1), (3, 0), port=port, apart_s=0.3, patience_s=5) == ["", "", ""]


def test_the_port_is_free_again_for_torchrun(port: int) -> None:
    told((2, 0), (2, 1), port=port)
    socket.create_server((HOST, port)).close()


def test_node_0_names_the_nodes_that_did_not_come_and_the_others_stop_with_it(port: int) -> None:
    start = time.monotonic()
    node_0, node_2 = told((4, 0), (4, 2), port=port)
    assert time.monotonic() - start < 4
    assert node_0.startswith(f"nodes 1, 3 of 4 did not come to {HOST} port {port} within 2 s; start the same command")
    assert node_2 == "node 2 stops because node 0 does, which says why"


def test_without_node_0_the_others_name_it(port: int) -> None:
    (said,) = told((2, 1), port=port, patience_s=1)
    assert said.startswith(f"node 0 does not answer at {HOST} port {port} within 1 s (Connection refused); start it")


def test_a_port_that_another_program_has_is_named_at_once(taken_port: int) -> None:
    start = time.monotonic()
    (said,) = told((2, 0), port=taken_port, patience_s=30)
    assert time.monotonic() - start < 1
    assert said == (
        f"port {taken_port} of node 0 can't be had (Address already in use), most likely another run has it; give "
        "all nodes another --master-port, or end that run"
    )


def test_a_program_that_is_no_node_does_not_hold_a_node_for_ever(taken_port: int) -> None:
    (said,) = told((2, 1), port=taken_port, patience_s=1)
    assert said.startswith("node 0 does not answer") and "(timed out)" in said


def test_a_stranger_on_the_port_is_not_counted(port: int) -> None:
    def knock() -> None:
        time.sleep(0.3)
        with socket.create_connection((HOST, port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

    threading.Thread(target=knock, daemon=True).start()
    assert told((2, 0), port=port, patience_s=1)[0].startswith("node 1 of 2 did not come")


def test_nodes_that_were_told_different_numbers_are_named(port: int) -> None:
    node_0, node_1 = told((2, 0), (3, 1), port=port)
    assert node_0 == "node 1 was started with --nnodes 3 and node 0 with 2; give all the same"
    assert node_1.startswith("node 1 stops")


def test_two_nodes_with_one_number_are_named(port: int) -> None:
    assert told((3, 0), (3, 1), (3, 1), port=port)[0] == (
        "two nodes were started with --node-rank 1; give each its own, 0 to 2"
    )


def test_a_node_that_was_ended_and_started_again_is_no_second_one(port: int) -> None:
    leave_after_coming(3, 1, port)
    assert told((3, 0), (3, 1), (3, 2), port=port, apart_s=1, patience_s=5) == ["", "", ""]


def test_a_node_that_left_again_is_missing(port: int) -> None:
    leave_after_coming(3, 1, port)
    assert told((3, 0), port=port)[0].startswith("nodes 1, 2 of 3 did not come")


def leave_after_coming(nnodes: int, rank: int, port: int) -> None:
    def come() -> None:
        time.sleep(0.3)
        with socket.create_connection((HOST, port)) as node:
            node.sendall(f"node {rank} of {nnodes}\n".encode())
            assert node.recv(5) == b"here\n"

    threading.Thread(target=come, daemon=True).start()


def test_node_0_must_be_reachable_under_the_name_that_all_were_given(port: int) -> None:
    with pytest.raises(
        UserError, match=r"node 0 can't reach itself at --master-addr no-such-host.invalid \(.*\); give"
    ):
        meet(2, 0, "no-such-host.invalid", port)
