"""A run that can't start reports one error and exits with code 2 on every node. These are real launches."""

import os
import subprocess
from pathlib import Path

from moelpr.base.run_folder import TRACKER_FILE
from tests.support.limits import PROCESS_S

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"


def start(folder: Path, node_rank: int, port: int, *arguments: str, nnodes: int = 2) -> subprocess.Popen:
    """Start a node with all that a command line needs, and what looks like a checkpoint and a corpus."""
    for name, content in ((TRACKER_FILE, "0"), ("x.bin", ""), ("x.idx", "")):
        (folder / name).write_text(content)
    data = ["--data-path", str(folder / "x"), "--load", str(folder)]
    arguments = (*"--recipe paper-stage1 --train-iters 1".split(), *data, *arguments)
    where = ["--nnodes", str(nnodes), "--node-rank", str(node_rank), "--master-addr", HOST, "--master-port", str(port)]
    command = [ROOT / "launch" / "stage1.sh", *where, "--nproc-per-node", "1", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdout=null, stderr=pipe)


def error_of(node: subprocess.Popen) -> str:
    """The error of a node that exits with code 2, in time."""
    try:
        _, errors = node.communicate(timeout=PROCESS_S)
    finally:
        node.kill()
    assert node.returncode == 2 and "Traceback" not in errors, errors
    return errors


def test_a_missing_node_is_named(port: int, tmp_path: Path) -> None:
    assert "error: node 1 of 2 did not connect to" in error_of(start(tmp_path, 0, port, "--join-timeout", "1"))


def test_an_unavailable_port_is_named_on_a_single_node_too(taken_port: int, tmp_path: Path) -> None:
    error = error_of(start(tmp_path, 0, taken_port, nnodes=1))
    assert f"error: port {taken_port} of node 0" in error and "Address already in use" in error


def test_a_missing_recipe_ends_both_nodes(port: int, tmp_path: Path) -> None:
    nodes = [start(tmp_path, rank, port, "--recipe", str(tmp_path / "none.yaml")) for rank in (0, 1)]
    assert all(f"there is no recipe {tmp_path}/none.yaml" in error_of(node) for node in nodes)
