"""Write the tasks of a workflow that are not done as a job of SkyPilot, and launch it with the user's `sky`.

SkyPilot runs the tasks of a job one after another, each on machines of its own, and again after machines were taken
away. Each runs `moelpr run FILE --task NAME`.
"""

import shlex
import subprocess
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.base import yaml_files
from moelpr.base.command import STOPPED
from moelpr.base.errors import MachineError, UserError
from moelpr.base.files import write_text
from moelpr.base.records import DOCUMENTED
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow

_FILES = "/tmp/moelpr"


@dataclass(frozen=True, config=DOCUMENTED)
class SkyPilotSettings:
    """Settings of jobs that SkyPilot starts in a cloud."""

    gpu: str | None = None
    """SkyPilot's name of the GPU, such as H100 (required for tasks with GPUs)."""
    resources: dict[str, Any] = field(default_factory=dict)
    """Resources of all tasks, such as infra: aws, image_id: "docker:REGISTRY/moelpr:0.2.0", use_spot: true."""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Resources of single tasks: task → resource → value."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Volumes with text, base and output: path → name."""
    file_mounts: dict[str, Any] = field(default_factory=dict)
    """Buckets or files, instead: path → source."""
    folder: str = "/work"
    """Folder on the machines from which relative paths start, on a volume or bucket."""
    setup: str = ""
    """Commands that install moelpr, if the image does not have it."""
    retries: Annotated[int, Field(ge=0)] = 4
    """How often a failed task is started again; stops and lost machines do not count."""
    envs: dict[str, str] = field(default_factory=dict)
    """Environment variables."""


def check(settings: SkyPilotSettings) -> None:
    """Raise a UserError if a setting is missing."""
    if not settings.volumes and not settings.file_mounts:
        raise UserError("--on skypilot requires volumes or file_mounts that keep the output; add one under skypilot")


def launch(workflow: Workflow, settings: SkyPilotSettings, file: Path, *, render_only: bool = False) -> None:
    """Write `skypilot.yaml` into the workflow's folder, for what is not done, and launch it as a managed job.

    Args:
        file: What `moelpr run` takes.

    Raises:
        UserError: The kind of the GPUs is missing.
    """
    if not (left := workflow.tasks_of_jobs()):
        return
    path, name = workflow.folder / "skypilot.yaml", workflow.folder.resolve().name
    documents = [{"name": name}, *(_document(task, settings, file) for task in left)]
    write_text(path, "---\n".join(map(yaml_files.dump, documents)))
    print(path)
    if not render_only:
        workflow.set_aside()
    if not render_only and subprocess.run(["sky", "jobs", "launch", "--name", name, str(path)], check=False).returncode:
        raise MachineError(f"sky could not launch {path}; its message is above")


def _document(task: Task, settings: SkyPilotSettings, file: Path) -> dict[str, Any]:
    recovery = {"max_restarts_on_errors": settings.retries, "recover_on_exit_codes": [STOPPED]}
    resources: dict[str, Any] = {"job_recovery": recovery}
    if task.gpus_per_node:
        if not settings.gpu:
            raise UserError(f"task {task.name} has GPUs; name their kind as gpu under skypilot, such as gpu: H100")
        resources["accelerators"] = {settings.gpu: task.gpus_per_node}
    else:
        resources |= {"cpus": f"{max(2, task.cpus)}+", "memory": f"{max(1, round(task.memory_gib))}+"}
    mounted = f"{_FILES}/{file.name}"
    command = shlex.join(["moelpr", "run", mounted, "--task", task.name])
    return {
        "name": task.name,
        "num_nodes": task.nodes,
        "resources": resources | settings.resources | settings.steps.get(task.name, {}),
        "file_mounts": {mounted: str(file.resolve()), **settings.file_mounts},
        **({"volumes": settings.volumes} if settings.volumes else {}),
        "envs": settings.envs,
        **({"setup": settings.setup} if settings.setup else {}),
        "run": f"cd {shlex.quote(settings.folder)}\n{_NODES if task.continues else ''}exec {command}\n",
    }


# The variables of torchrun, from SkyPilot's.
_NODES = """\
export NNODES=$SKYPILOT_NUM_NODES NODE_RANK=$SKYPILOT_NODE_RANK NPROC_PER_NODE=${SKYPILOT_NUM_GPUS_PER_NODE:-1}
export MASTER_ADDR=$(head -n 1 <<<"$SKYPILOT_NODE_IPS") MASTER_PORT=29500
"""
