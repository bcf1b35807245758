"""A project of a tiny model as a chain of jobs."""

import re
import subprocess
import sys
from pathlib import Path

from moelpr.base.yaml_files import dump
from tests.slurm.cluster import Cluster
from tests.slurm.material import ROOT, make_model, make_text

TRAINING = {"micro-batch-size": 1, "global-batch-size": 4, "seq-length": 32, "train-iters": 6, "log-interval": 10}
TRAINING |= {"lr": 1e-2, "min-lr": 1e-3, "lr-warmup-fraction": 0.3, "expert-model-parallel-size": 2}
TASKS = ("preprocess-el", "preprocess-hu", "preprocess-en", "replay", "convert", "stage1", "stage2", "export")
TASKS += ("evaluate", "routing", "card", "report")


class ProjectChain:
    """`moelpr run languages.yaml --on slurm` in a folder, with two nodes for each training.

    Attributes:
        run: The output.
    """

    def __init__(self, cluster: Cluster, folder: Path, **training: int) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        self._training = TRAINING | training
        folder.mkdir(exist_ok=True)
        make_model(folder)
        make_text(folder)

    def submit(self, **stage2: int) -> dict[str, str]:
        """Task → the line about it. `stage2`: Other flags of stage 2."""
        project = {
            "model": "hf",
            "output": "run",
            "languages": {"expanded": {"el": "el.jsonl", "hu": "hu.jsonl"}, "original": {"en": "en.jsonl"}},
            "budget": {"epochs": 1},
            "method": "moe-lpr",
            "experts": {"new": 4, "topk": 2},
            "hardware": {"gpu": "none"},
            "steps": {
                "preprocess": {"workers": 1},
                "stage1": self._training,
                "stage2": self._training | stage2,
                "evaluate": {"max-documents": 5},
            },
            "slurm": {
                "options": {"partition": "low", "time": "10"},
                "steps": {"stage1": {"nodes": 2}, "stage2": {"nodes": 2}},
                "shards": 3,
            },
        }
        (self.folder / "languages.yaml").write_text(dump(project))
        command = [sys.executable, "-m", "moelpr", "run", "languages.yaml", "--on", "slurm"]
        environment = self.cluster.environment | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"^([\w-]+): (.*)", done.stdout, re.MULTILINE))

    def wait(self, output: dict[str, str]) -> dict[str, str]:
        """Task → the final state of its job."""
        jobs = {name: line.split()[1].strip(",") for name, line in output.items() if line.startswith("job")}
        return {name: self.cluster.wait(job, timeout_s=300) for name, job in jobs.items()}

    def log(self, name: str) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "slurm").glob(f"run-{name}-*.log")))
