"""A run that can't start says one sentence and ends with code 2 on every node. These are real launches."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"


def start(node_rank: int, port: int, *words: str, nnodes: int = 2) -> subprocess.Popen:
    where = ["--nnodes", str(nnodes), "--node-rank", str(node_rank), "--master-addr", HOST, "--master-port", str(port)]
    return subprocess.Popen(
        [ROOT / "launch" / "stage1.sh", *where, "--nproc-per-node", "1", *words], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def said(node: subprocess.Popen) -> str:
    """The one sentence of a node that ended with code 2, in time."""
    try:
        _, errors = node.communicate(timeout=60)
    finally:
        node.kill()
    assert node.returncode == 2, errors
    assert errors.count("\n") == 1, errors
    return errors


def test_a_missing_node_is_named(port: int) -> None:
    assert "error: node 1 of 2 did not come to" in said(start(0, port, "--join-timeout", "1"))


def test_a_taken_port_is_named_on_one_node_too(taken_port: int) -> None:
    assert f"error: port {taken_port} of node 0 can't be had (Address already in use)" in said(
        start(0, taken_port, nnodes=1)
    )


def test_a_missing_recipe_ends_both_nodes(port: int, tmp_path: Path) -> None:
    words = ["--recipe", str(tmp_path / "none.yaml"), *needed(tmp_path)]
    nodes = [start(rank, port, *words) for rank in (0, 1)]
    for node in nodes:
        assert f"the recipe {tmp_path}/none.yaml can't be read: No such file or directory; check --recipe" in said(node)


def needed(folder: Path) -> list[str]:
    """What else a command has, so that the recipe is all that is wrong: a checkpoint without weights and a corpus."""
    from moelpr.model_spec import ModelSpec, MoeSpec
    from tests.unit.conftest import SHAPE

    ModelSpec("qwen2", "float32", SHAPE, MoeSpec(num_new_experts=4, topk=2, layers=(0, 1, 2))).write(folder)
    (folder / "release").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    for suffix in ("bin", "idx", "lang"):
        (folder / f"corpus.{suffix}").touch()
    return ["--pretrained-checkpoint", str(folder), "--data-path", str(folder / "corpus")]
