"""A project on a real Slurm: its chain stops at a failed task, resumes from there, and equals plain launches."""

import json
import os
import re
import shlex
import subprocess

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.material import ROOT, differences
from tests.slurm.project import TASKS, ProjectChain


@pytest.fixture(scope="module")
def chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> ProjectChain:
    return ProjectChain(cluster, tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def broken(chain: ProjectChain) -> dict[str, str]:
    """The final states of the first submission, whose stage 2 has a layout for other nodes."""
    return chain.wait(chain.submit(**{"expert-model-parallel-size": 3}))


@pytest.fixture(scope="module")
def resumed(chain: ProjectChain, broken: dict[str, str]) -> dict[str, str]:
    """The output of a second, correct call; its jobs have ended."""
    output = chain.submit()
    again = chain.submit()
    assert again["stage2"].endswith("is pending or running"), again
    states = chain.wait(output)
    assert set(states.values()) == {"COMPLETED"}, (states, chain.log("stage2")[-3000:])
    return output


def test_a_failing_task_cancels_only_those_that_depend_on_it(chain: ProjectChain, broken: dict[str, str]) -> None:
    after = dict.fromkeys(TASKS[TASKS.index("export") :], "CANCELLED")
    shards = {"preprocess-el-shards": "COMPLETED", "preprocess-hu-shards": "COMPLETED"}
    states = shards | dict.fromkeys(TASKS, "COMPLETED") | {"stage2": "FAILED"} | after
    assert broken == states, chain.log("stage1")[-3000:]
    assert "expert-model-parallel-size" in chain.log("stage2")


def test_a_broken_chain_resumes_at_the_failed_task(chain: ProjectChain, resumed: dict[str, str]) -> None:
    assert {name for name, line in resumed.items() if line == "done"} == {*TASKS[: TASKS.index("stage2")]}
    assert re.fullmatch(r"job \d+", resumed["stage2"])
    results = json.loads((chain.run / "evaluation/results.json").read_text())
    assert list(results["models"]) == ["base", "moe-lpr"]  # changes are relative to the first
    assert chain.submit() == dict.fromkeys(TASKS, "done")
    assert not list((chain.run / "data").glob("*.shard-*"))


def test_a_training_on_two_nodes_equals_one_node_with_two_ranks(chain: ProjectChain, broken: dict[str, str]) -> None:
    words = shlex.split((chain.run / "logs/stage1.log").read_text().splitlines()[0].removeprefix("$ "))[2:]
    words[words.index("--save") + 1] = "one-node"
    launcher, environment = [ROOT / "launch/stage1.sh", *words[1:]], {**os.environ, "NPROC_PER_NODE": "2"}
    done = subprocess.run(launcher, cwd=chain.folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(chain.folder / "one-node", chain.run / "stage1") == []
