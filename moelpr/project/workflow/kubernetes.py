"""Render the tasks of a workflow that are not done as Kubernetes manifests, and apply them with the user's kubectl.

All tasks are one JobSet, whose jobs start when those that they depend on are complete. A pod runs `moelpr run FILE
--task NAME`, and gets the file from a ConfigMap.
"""

import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from moelpr.base import records, yaml_files
from moelpr.base.command import STOPPED
from moelpr.base.errors import MachineError, UserError
from moelpr.base.files import write_text
from moelpr.base.records import DOCUMENTED
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow


def _as_text(value: Any) -> Any:
    if isinstance(value, bool | float | None):  # YAML reads yes as true, and 1.10 as 1.1
        raise UserError(f"expected text, got {value}; put it in quotes")
    return str(value) if isinstance(value, int) else value


Words = dict[str, Annotated[str, BeforeValidator(_as_text, json_schema_input_type=int | str)]]
Manifest = dict[str, Any]
# A host, a name, a tag and a digest, of which only the name is required.
_IMAGE = r"(\w[\w.-]*(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?"
_FILES, _PORT = "/etc/moelpr", 29500
# Fields of a pod that other settings decide; the last one is `grace_s`.
_OUR_FIELDS = {"containers", "restartPolicy", "terminationGracePeriodSeconds"}
_OUTPUT = "moelpr/output"  # annotation with the folder of a project
_MOST_NEEDS = 5  # JobSet's limit of dependsOn
_MOST_LETTERS = 63 - len("-abcde")  # a pod's name is its host's, and ends with letters of its own


@dataclass(frozen=True, config=DOCUMENTED)
class KubernetesSettings:
    """Settings of jobs on a Kubernetes cluster."""

    image: str | None = None
    """Image that has moelpr (required), such as REGISTRY/moelpr:0.2.0."""
    claim: str | None = None
    """PersistentVolumeClaim with text, base and output (required), which all nodes can write (ReadWriteMany)."""
    folder: str = "/work"
    """Where the claim is mounted, from which relative paths start."""
    namespace: str | None = None
    """Namespace (default: kubectl's)."""
    gpu: str = "nvidia.com/gpu"
    """Resource that is a GPU."""
    training: Words = field(default_factory=dict)
    """Further resources of each node of a training, such as memory: 1Ti, cpu: 96 and what its network needs."""
    grace_s: Annotated[int, Field(ge=1)] = 1800
    """Seconds in which a stopped training must finish its step and save."""
    retries: Annotated[int, Field(ge=0)] = 4
    """How often a failed node of a task is started again; stops and lost machines do not count."""
    secrets: list[str] = field(default_factory=list)
    """Secrets whose keys become environment variables, such as HF_TOKEN."""
    env: Words = field(default_factory=dict)
    """Environment variables."""
    labels: Words = field(default_factory=dict)
    """Labels of jobs and pods, such as team: nlp."""
    pod: dict[str, Any] = field(default_factory=dict)
    """Further fields of each pod's spec, such as nodeSelector, tolerations, securityContext, volumes."""
    container: dict[str, Any] = field(default_factory=dict)
    """Further fields of each container, such as securityContext, volumeMounts."""
    annotations: Words = field(default_factory=dict)
    """Annotations of pods, such as k8s.v1.cni.cncf.io/networks: rdma."""


def check(settings: KubernetesSettings, paths: Mapping[str, Iterable[str | None]] | None = None) -> None:
    """Raise a UserError if a setting is missing or wrong, or pods lack one of the paths, by the file's key."""
    if missing := [name for name in ("image", "claim") if not getattr(settings, name)]:
        raise UserError(f"kubernetes.{missing[0]} is missing, which --on kubernetes requires; add it")
    if not re.fullmatch(_IMAGE, str(settings.image)):
        raise UserError(f"kubernetes.image: {settings.image} is no image; write REGISTRY/NAME:TAG, NAME in lower case")
    for key in ("claim", "namespace", "secrets"):
        value = getattr(settings, key) or []
        for name in [value] if isinstance(value, str) else value:
            if not re.fullmatch("[a-z0-9]([-.a-z0-9]*[a-z0-9])?", name):
                raise UserError(f"kubernetes.{key}: {name} is no name; use lower-case letters, digits, - and .")
    if not settings.folder.startswith("/"):
        raise UserError(f"kubernetes.folder is where the claim is mounted, got {settings.folder}; start it with /")
    if "/" not in settings.gpu:
        raise UserError(f"kubernetes.gpu is the resource of a GPU, such as nvidia.com/gpu, got {settings.gpu}")
    if settings.gpu in settings.training:
        raise UserError(f"kubernetes.training.{settings.gpu} follows from hardware; remove it")
    for key, quantity in settings.training.items():
        if not re.fullmatch(r"cpu|memory|ephemeral-storage|hugepages-\w+|.+/.+", key):
            raise UserError(f"kubernetes.training.{key} is no resource; write cpu, memory, or DOMAIN/NAME of a device")
        units, such_as = ("m", "96") if key == "cpu" else ("m|k|[MGTPE]|[KMGTPE]i", "96 or 1Ti")
        if not re.fullmatch(rf"\d+(\.\d+)?({units})?", quantity):
            raise UserError(f"kubernetes.training.{key} must be an amount such as {such_as}, got {quantity}; change it")
    for place, fields in (("pod", _OUR_FIELDS), ("container", {"name", "args", "resources"})):
        if taken := fields & getattr(settings, place).keys():
            raise UserError(f"kubernetes.{place}.{min(taken)} is set by moelpr run; remove it")
    mounts = settings.container.get("volumeMounts", [])
    if not isinstance(mounts, list) or not all(isinstance(one, dict) and "mountPath" in one for one in mounts):
        raise UserError("kubernetes.container.volumeMounts must be a list of {name: …, mountPath: …}; correct it")
    mounted = [settings.folder, *(str(one["mountPath"]) for one in mounts)]
    for key, path in ((key, path) for key, some in (paths or {}).items() for path in some if path):
        in_pod = Path(os.path.normpath(Path(settings.folder, path)))  # in the folder, if it is on the Hub or a URI
        if not any(in_pod.is_relative_to(folder) for folder in mounted):
            raise UserError(f"{key}: pods have no {path}; put it below kubernetes.folder, {settings.folder}")


def launch(workflow: Workflow, settings: KubernetesSettings, file: Path, *, render_only: bool = False) -> None:
    """Write the manifests of what is not done to `kubernetes/` in the workflow's folder, and apply them.

    Args:
        file: What `moelpr run` takes.

    Raises:
        UserError: What was applied before still runs.
    """
    if not (tasks := workflow.tasks_of_jobs()):
        return
    if not render_only and str(settings.image).startswith("REGISTRY/"):
        raise UserError(f"kubernetes.image is the example's, {settings.image}; name your registry")
    given = settings.training.get("memory")
    needy = max((task for task in tasks if task.continues), key=lambda task: task.memory_gib, default=None)
    if given and needy and _bytes(given) < needy.memory_gib * 2**30:
        raise UserError(
            f"kubernetes.training.memory is {given}, but {needy.name} needs {math.ceil(needy.memory_gib)}Gi of each "
            "node; raise it, or remove it"
        )
    if not render_only and Path.cwd() != Path(settings.folder):
        print(f"note: in jobs, relative paths start in {settings.folder}, where the claim is mounted", file=sys.stderr)
    chain = Chain(tasks, workflow.folder, settings, file)
    path = workflow.folder / "kubernetes" / f"{chain.name}.yaml"
    write_text(path, "".join(f"---\n{yaml_files.dump(one)}" for one in (chain.config_map(), chain.job_set())))
    if not render_only:
        _apply(chain.name, path, settings.namespace, workflow)
    print(path if render_only else f"{path}: applied")


def states(folder: Path, namespace: str | None) -> dict[str, str]:
    """The state of each job of the JobSet that was applied last, by its task's name as Kubernetes takes it."""
    applied = sorted((folder / "kubernetes").glob("*.yaml"), key=lambda path: path.stat().st_mtime)
    if not applied or not shutil.which("kubectl"):
        return {}
    words = ["get", "jobset", applied[-1].stem, "--ignore-not-found", "--output", "json", "--request-timeout", "5s"]
    try:
        shown = _kubectl(namespace, *words)
    except MachineError as error:
        return {"": str(error)}
    found = records.parse_json(shown, "what kubectl prints", "try again") if shown.strip() else {}
    phases = {"failed": "failed, see kubectl logs", "ready": "pods run", "active": "pods are pending or starting"}
    phases |= {"succeeded": "job is complete"}
    return {
        job["name"]: next((text for phase, text in phases.items() if job.get(phase)), "job waits")
        for job in found.get("status", {}).get("replicatedJobsStatus", ())
    }


class Chain:
    """The manifests of tasks, which have the workflow's name."""

    def __init__(self, tasks: list[Task], folder: Path, settings: KubernetesSettings, file: Path) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._settings, self._file, self._folder = settings, file, folder
        self._key = re.sub(r"[^\w.-]", "-", file.name, flags=re.ASCII)  # as Kubernetes takes it
        longest = max((len(f"-{label(task.name)}-0-{task.nodes}") for task in tasks), default=0)
        name = label(folder.resolve().name)
        name = name if name[:1].isalpha() else f"run-{name or hashlib.sha256(folder.name.encode()).hexdigest()[:4]}"
        if len(name) > (most := _MOST_LETTERS - longest):  # names that begin alike must differ
            name = f"{name[: most - 5].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"
        self.name = name

    def config_map(self) -> Manifest:
        """The file that the pods read."""
        return self._object("v1", "ConfigMap", data={self._key: self._file.read_text(encoding="utf-8")})

    def _needs(self, task: Task) -> list[str]:
        """The tasks that a task waits for, without those that another of them waits for."""
        needs = [name for name in self._tasks if name in task.inputs]
        behind = {name for need in needs for name in self._behind(need)}
        return [name for name in needs if name not in behind]

    def _behind(self, name: str) -> set[str]:
        needs = {need for need in self._tasks[name].inputs if need in self._tasks}
        return needs.union(*(self._behind(need) for need in needs))

    def job_set(self) -> Manifest:
        """All tasks."""
        depends: dict[str, list[str]] = {}
        for task in self._tasks.values():
            needs = [need for need in self._needs(task) if need in depends]
            for before, need in zip(needs, needs[_MOST_NEEDS:], strict=False):  # wait for too many in turn
                depends[need] = list(dict.fromkeys([*depends[need], before]))[-_MOST_NEEDS:]
            depends[task.name] = needs[-_MOST_NEEDS:]
        jobs: list[Manifest] = []
        for task in self._tasks.values():
            after = [{"name": label(need), "status": "Complete"} for need in depends[task.name]]
            job = {"name": label(task.name), "template": {"spec": self._job(task)}}
            jobs.append(job | ({"dependsOn": after} if after else {}))
        spec = {"network": {"enableDNSHostnames": True}, "replicatedJobs": jobs}
        return self._object("jobset.x-k8s.io/v1alpha2", "JobSet", spec=spec)

    def _job(self, task: Task) -> Manifest:
        settings = self._settings
        mounts = {"work": settings.folder, "file": _FILES, "shm": "/dev/shm"}
        container = {
            "name": "moelpr",
            "image": settings.image,
            "args": ["moelpr", "run", f"{_FILES}/{self._key}", "--task", task.name],
            "workingDir": settings.folder,
            "env": self._variables(task),
            "envFrom": [{"secretRef": {"name": name}} for name in settings.secrets],
            "resources": self._resources(task),
            "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
        }
        container = _joined(container, settings.container)
        rules = [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},  # wrong settings or input
        ]
        return {
            "completionMode": "Indexed",
            "completions": task.nodes,
            "parallelism": task.nodes,
            "backoffLimit": settings.retries * task.nodes,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": dict(settings.labels), "annotations": dict(settings.annotations)},
                "spec": {"restartPolicy": "Never", **self._pod(container)},
            },
        }

    def _object(self, version: str, kind: str, **content: Manifest) -> Manifest:
        namespace = {"namespace": self._settings.namespace} if self._settings.namespace else {}
        annotations = {_OUTPUT: str(self._folder.absolute())}
        metadata = {"name": self.name, **namespace, "labels": dict(self._settings.labels), "annotations": annotations}
        return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}

    def _pod(self, container: Manifest) -> Manifest:
        volumes = [
            {"name": "work", "persistentVolumeClaim": {"claimName": self._settings.claim}},
            {"name": "file", "configMap": {"name": self.name}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # for data loaders and NCCL; the default is 64 MiB
        ]
        own: Manifest = {
            "terminationGracePeriodSeconds": self._settings.grace_s,
            "volumes": volumes,
            "containers": [container],
        }
        return _joined(own, self._settings.pod)

    def _variables(self, task: Task) -> list[Manifest]:
        """The user's variables, and of a training those of torchrun, as Kubeflow sets them."""
        values, rank = {}, []
        if task.continues:
            values = {
                "PET_NNODES": str(task.nodes),
                "PET_NPROC_PER_NODE": str(max(1, task.gpus_per_node)),
                "PET_MASTER_ADDR": f"{self.name}-{label(task.name)}-0-0.{self.name}",
                "PET_MASTER_PORT": str(_PORT),
                "MOELPR_GRACE_SECONDS": str(self._settings.grace_s),
                "JOIN_TIMEOUT": "900",  # nodes load an image, which takes minutes
            }
            place = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            rank = [{"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": place}}}]
        return [*({"name": name, "value": value} for name, value in (values | self._settings.env).items()), *rank]

    def _resources(self, task: Task) -> Manifest:
        gpus = {self._settings.gpu: str(task.gpus_per_node)} if task.gpus_per_node else {}
        if task.continues:
            return {"limits": {**gpus, **self._settings.training}}
        needs = {"cpu": str(task.cpus), "memory": f"{max(1, math.ceil(task.memory_gib))}Gi"}
        return {"requests": needs, "limits": gpus}


def _joined(own: Manifest, more: Mapping[str, Any]) -> Manifest:
    """Fields with the user's: lists get theirs behind ours, all else is theirs."""
    return own | {key: [*own[key], *value] if isinstance(own.get(key), list) else value for key, value in more.items()}


def _bytes(quantity: str) -> float:
    number = quantity.rstrip("mkKMGTPEi")
    unit = quantity[len(number) :].strip("m")
    power = "kMGTPE".index(unit[0].replace("K", "k")) + 1 if unit else 0
    return float(number) * (1024 if unit.endswith("i") else 1000) ** power


def label(name: str) -> str:
    """A name as Kubernetes takes it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _apply(name: str, path: Path, namespace: str | None, workflow: Workflow) -> None:
    """Create a JobSet, in place of a finished one of that name and project."""
    output = str(workflow.folder.absolute())
    shown = _kubectl(namespace, "get", "jobset", name, "--ignore-not-found", "--output", "json")
    if shown.strip():
        found = records.parse_json(shown, "what kubectl prints", "try again")
        other, status = found["metadata"].get("annotations", {}).get(_OUTPUT, output), found.get("status", {})
        if other != output:
            raise UserError(f"jobset {name} is that of the project in {other}; give your output folder another name")
        conditions = {one["type"] for one in status.get("conditions", ()) if one["status"] == "True"}
        if not conditions & {"Completed", "Failed"}:
            raise UserError(f"jobset {name} is not finished; wait, or delete it (kubectl delete jobset {name})")
        _kubectl(namespace, "delete", "jobset", name, "--wait", "--cascade", "foreground")
    workflow.set_aside()
    _kubectl(namespace, "apply", "--filename", str(path))


def _kubectl(namespace: str | None, *words: str) -> str:
    where = ["--namespace", namespace] if namespace else []
    done = subprocess.run(["kubectl", *where, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        printed = [line.strip() for line in done.stderr.splitlines() if not re.match(r"[IWE]\d{4} |Warning:", line)]
        reason = "; ".join(filter(None, printed)) or "no message"
        is_missing = re.search('resource type "jobset|no matches for kind "JobSet', reason)
        remedy = "install JobSet in the cluster (https://jobset.sigs.k8s.io)" if is_missing else "correct that"
        raise MachineError(f"kubectl {words[0]} fails ({reason}); {remedy}, and run this again")
    return done.stdout
