"""A run that can't start reports one error and exits with code 2 on every node. These are real launches."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"


def start(node_rank: int, port: int, *arguments: str, nnodes: int = 2) -> subprocess.Popen:
    where = ["--nnodes", str(nnodes), "--node-rank", str(node_rank), "--master-addr", HOST, "--master-port", str(port)]
    command = [ROOT / "launch" / "stage1.sh", *where, "--nproc-per-node", "1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **streams)  # type: ignore[call-overload]


def error_of(node: subprocess.Popen) -> str:
    """The error of a node that exits with code 2, in time."""
    try:
        _, errors = node.communicate(timeout=60)
    finally:
        node.kill()
    assert node.returncode == 2, errors
    assert errors.count("\n") == 1, errors
    return errors


def test_a_missing_node_is_named(port: int) -> None:
    assert "error: node 1 of 2 did not connect to" in error_of(start(0, port, "--join-timeout", "1"))


def test_an_unavailable_port_is_named_on_a_single_node_too(taken_port: int) -> None:
    error = error_of(start(0, taken_port, nnodes=1))
    assert f"error: port {taken_port} of node 0" in error and "Address already in use" in error


def test_a_missing_recipe_ends_both_nodes(port: int, tmp_path: Path) -> None:
    arguments = ["--recipe", str(tmp_path / "none.yaml"), *needed(tmp_path)]
    nodes = [start(rank, port, *arguments) for rank in (0, 1)]
    for node in nodes:
        error = error_of(node)
        assert f"{tmp_path}/none.yaml; pass " in error


def needed(folder: Path) -> list[str]:
    """The other arguments of a valid command: a checkpoint without weights and a corpus."""
    from moelpr.model_spec import ModelSpec, MoeSpec
    from tests.unit.conftest import SHAPE

    ModelSpec("qwen2", "float32", SHAPE, MoeSpec(num_new_experts=4, topk=2, layers=(0, 1, 2))).write(folder)
    (folder / "release").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    for suffix in ("bin", "idx", "lang"):
        (folder / f"corpus.{suffix}").touch()
    return ["--pretrained-checkpoint", str(folder), "--data-path", str(folder / "corpus")]
