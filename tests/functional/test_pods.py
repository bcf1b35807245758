"""A JobSet's pods as processes on this machine: drained and killed ones resume, and the end is that of a plain run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelpr.base.yaml_files import dump
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.steps import workflow_of
from moelpr.project.workflow import kubernetes
from moelpr.project.workflow.kubernetes import KubernetesSettings
from moelpr.project.workflow.workflow import Workflow
from tests.faults.commands import records
from tests.slurm.material import ROOT, differences, make_model, make_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAINING = {"micro-batch-size": 1, "global-batch-size": 4, "seq-length": 32, "lr-warmup-fraction": 0.1}
TRAINING |= {"train-iters": 20, "save-interval": 5}


class Pods:
    """Runs a JobSet as its controllers do, each pod as a process whose folder is the volume.

    Attributes:
        codes: Job → exit codes of its pods.
    """

    def __init__(self, manifest: Path, volume: Path) -> None:
        config, job_set = yaml.safe_load_all(manifest.read_text())
        self._volume, self._config = volume, volume / "config"
        self._config.mkdir(exist_ok=True)
        for name, text in config["data"].items():
            (self._config / name).write_text(text)
        self._jobs = {job["name"]: job for job in job_set["spec"]["replicatedJobs"]}
        self._running: dict[tuple[str, int], subprocess.Popen] = {}
        self._done: dict[str, set[int]] = {name: set() for name in self._jobs}
        self.codes: dict[str, list[int]] = {name: [] for name in self._jobs}
        self._counted = dict.fromkeys(self._jobs, 0)

    def run(self, disturb: Callable[["Pods"], object]) -> None:
        """Run all jobs; `disturb` is called again and again."""
        while any(len(self._done[name]) < self._spec(name)["completions"] for name in self._jobs):
            for name, job in self._jobs.items():
                needs = [need["name"] for need in job.get("dependsOn", ())]
                if all(len(self._done[need]) == self._spec(need)["completions"] for need in needs):
                    for index in range(self._spec(name)["completions"]):
                        if index not in self._done[name] and (name, index) not in self._running:
                            self._running[name, index] = self._start(name, index)
            time.sleep(0.1)
            disturb(self)
            for (name, index), process in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[name, index]
                    self._end(name, index, process.returncode)

    def kill(self, name: str, index: int, number: signal.Signals) -> None:
        """Send a signal to PID 1 of a pod; when that has ended, Kubernetes kills the rest."""
        self._running[name, index].send_signal(number)

    def _spec(self, name: str) -> dict[str, Any]:
        return self._jobs[name]["template"]["spec"]

    def _start(self, name: str, index: int) -> subprocess.Popen:
        [container] = self._spec(name)["template"]["spec"]["containers"]
        variables = {one["name"]: one.get("value", str(index)) for one in container["env"]}
        if "PET_MASTER_ADDR" in variables:
            assert variables["PET_MASTER_ADDR"] == f"greek-{name}-0-0.greek"  # the name of pod 0
            variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29871"}
        words = [re.sub("^/etc/moelpr", str(self._config), word) for word in container["args"][1:]]
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("PET_", "SLURM_"))}
        environment, command = outer | variables | {"PYTHONPATH": str(ROOT)}, [sys.executable, "-m", "moelpr", *words]
        log = (self._volume / f"{name}-{index}.log").open("a")
        return subprocess.Popen(command, cwd=self._volume, env=environment, stdout=log, stderr=log)

    def _end(self, name: str, index: int, code: int) -> None:
        self.codes[name].append(code)
        if code == 0:
            self._done[name].add(index)
            return
        rules = self._spec(name)["podFailurePolicy"]["rules"]
        actions = [rule["action"] for rule in rules if code in rule.get("onExitCodes", {}).get("values", ())]
        action = [*actions, "Count"][0]
        log = (self._volume / f"{name}-{index}.log").read_text()
        assert action != "FailJob", log[-3000:]
        self._counted[name] += action == "Count"
        assert self._counted[name] <= self._spec(name)["backoffLimit"], log[-3000:]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model(tmp_path)
    make_text(tmp_path)
    content = {
        "model": "hf",
        "output": "greek",
        "languages": {"expanded": {"el": "el.jsonl"}, "original": {"en": "en.jsonl"}},
        "budget": {"epochs": 1},
        "method": "moe-lpr",
        "experts": {"new": 4},
        "steps": {"preprocess": {"workers": 1}, "stage1": TRAINING, "stage2": TRAINING},
    }
    (tmp_path / "languages.yaml").write_text(dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def workflow_until_export(nodes: int) -> Workflow:
    whole = workflow_of(ResolvedProject(read_project(Path("languages.yaml"))))
    wanted = [task for task in whole.tasks.values() if task.name not in ("evaluate", "routing", "card", "report")]
    return Workflow(whole.folder, [replace(task, nodes=nodes) if task.continues else task for task in wanted])


def test_drained_and_killed_pods_resume_to_the_end_of_a_plain_run(project: Path, monkeypatch) -> None:
    settings = KubernetesSettings(image="i", claim="c", folder=".")
    kubernetes.launch(workflow_until_export(2), settings, Path("languages.yaml"), render_only=True)
    pods = Pods(project / "greek/kubernetes/greek.yaml", project)
    left = [("stage1", 1, signal.SIGTERM, 3), ("stage2", 0, signal.SIGKILL, 7)]

    def disturb(pods: Pods) -> None:
        """Drain one node of stage 1, which asks only that pod to stop; kill a pod of stage 2 without a warning."""
        if left and len(records(project / "greek" / left[0][0])) >= left[0][3]:
            pods.kill(*left.pop(0)[:3])

    pods.run(disturb)
    assert pods.codes["stage1"] == [75, 75, 0, 0]
    assert pods.codes["stage2"][0] == -signal.SIGKILL and pods.codes["stage2"][-2:] == [0, 0]
    assert all(codes == [0] for name, codes in pods.codes.items() if not name.startswith("stage"))

    (project / "greek").rename(project / "by-pods")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    workflow_until_export(1).run()
    for stage in ("stage1", "stage2"):
        assert differences(project / "greek" / stage, project / "by-pods" / stage) == []
    for name in ("model.safetensors", "config.json"):
        assert (project / "greek/hf" / name).read_bytes() == (project / "by-pods/hf" / name).read_bytes()
