"""A project becomes a managed job of SkyPilot, which its own schemas (0.14.1) accept as it is written here."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.project.workflow.skypilot import SkyPilotSettings, check, launch
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow
from tests.support.programs import write_program


def settings(**values: Any) -> SkyPilotSettings:
    return records.validate(SkyPilotSettings, values, "skypilot", "correct it")


def documents(tmp_path: Path, **values: Any) -> list[dict[str, Any]]:
    file = tmp_path / "languages.yaml"
    file.touch()
    tasks = [
        Task(name="convert", command=["c"], cpus=4, memory_gib=16),
        Task(name="stage1", command=["c"], made_from=("convert",), continues=Path("1"), nodes=2, gpus_per_node=8),
    ]
    check(settings(**values))
    launch(Workflow(tmp_path / "greek", tasks), settings(**values), file, render_only=True)
    return list(yaml.safe_load_all((tmp_path / "greek" / "skypilot.yaml").read_text()))


def test_a_project_is_a_job_whose_tasks_follow_one_another(tmp_path: Path) -> None:
    resources = {"infra": "aws", "use_spot": True}
    job, convert, stage1 = documents(
        tmp_path, gpu="H100", resources=resources, steps={"convert": {"use_spot": False}}, volumes={"/work": "greek"}
    )
    assert job == {"name": "greek"}
    recovery = {"job_recovery": {"max_restarts_on_errors": 4, "recover_on_exit_codes": [75]}}
    assert convert["resources"] == recovery | {"infra": "aws", "use_spot": False, "cpus": "4+", "memory": "16+"}
    assert stage1["resources"] == recovery | resources | {"accelerators": {"H100": 8}}
    assert (stage1["name"], stage1["num_nodes"], stage1["volumes"]) == ("stage1", 2, {"/work": "greek"})
    assert stage1["file_mounts"] == {"/tmp/moelpr/languages.yaml": str(tmp_path / "languages.yaml")}


def test_each_node_tells_the_launcher_its_place(tmp_path: Path) -> None:
    *_, stage1 = documents(tmp_path, gpu="H100", volumes={"/work": "greek"}, folder=str(tmp_path))
    write_program(tmp_path / "moelpr", 'echo "$@: $NNODES $NODE_RANK $NPROC_PER_NODE $MASTER_ADDR:$MASTER_PORT"')
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    environment = {**os.environ, **node, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", stage1["run"]], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "run /tmp/moelpr/languages.yaml --task stage1: 2 1 8 10.0.0.1:29500\n"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "requires volumes or file_mounts"),
        ({"volumes": {"/work": "v"}}, "task stage1 has GPUs; name their kind"),
        ({"volume": {}}, "volume is unknown"),
    ],
)
def test_what_is_missing_is_one_sentence(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        documents(tmp_path, **values)
