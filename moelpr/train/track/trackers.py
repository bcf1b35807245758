"""Trackers of experiments: Weights & Biases and MLflow, behind one interface.

TensorBoard's files belong to a run folder and are written in the training process; these may be servers elsewhere. None
of them may get credentials or the names of hosts.
"""

import os
import re
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import batched
from pathlib import Path
from typing import Any, ClassVar

from moelpr.base.versions import install_command

_HOST_NAMES = frozenset("ADDR HOST HOSTNAME URI URL".split())
_SECRET_NAMES = frozenset("KEY PASSWORD SECRET TOKEN".split())
# Flags whose values would be one of them.
_PRIVATE_FLAG = re.compile(rf"(^|_)({'|'.join(_HOST_NAMES | _SECRET_NAMES)}|PORT)(_|$)", re.IGNORECASE)


class Tracker(ABC):
    """A run in one tracker. All calls come from one thread; any of them may fail, and `start` is then called again."""

    name: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, project: str, args: Any, run: str, folder: Path) -> None:
        """Connect to nothing yet; `run` is the run's ID, and `folder` for what the tracker keeps on this machine."""
        self.project, self.args, self.run, self.folder = project, args, run, folder

    @abstractmethod
    def start(self) -> Mapping[str, int]:
        """Open the run, or make it: metric → last step that it has; -1 for others."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add values of a step, which is not below those before it."""

    @abstractmethod
    def settings(self, stage: str, values: Mapping[str, Any]) -> None:
        """Record the settings of a stage; what is recorded stays."""

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Record results of the whole run, in place of earlier ones."""
        self.log(values, step)

    @abstractmethod
    def files(self, folder: Path) -> None:
        """Record the files of a folder."""

    @abstractmethod
    def finish(self) -> None:
        """Send what is left."""


class Wandb(Tracker):
    name, package = "Weights & Biases", "wandb"

    def start(self) -> Mapping[str, int]:
        import wandb

        args = self.args
        # Metadata that it would collect has the names of user and host, and the command line.
        quiet = wandb.Settings(
            x_disable_meta=True, x_disable_machine_info=True, disable_git=True, save_code=False, console="off", host=""
        )
        self._run = wandb.init(
            project=self.project,
            entity=args.wandb_entity or None,
            id=self.run,
            name=args.wandb_exp_name or self.run,
            dir=args.wandb_save_dir or self.folder,
            resume="allow",
            settings=quiet,
        )
        if self._run.offline:
            # It does not know what was logged before, and a kill may have cost some of it, so it gets all again.
            own = Path(self._run.dir).parent
            for old in own.parent.glob(f"offline-run-*-{self.run}"):
                if old != own:
                    old.rename(old.with_name(f"superseded-{old.name}"))
        last = self._run.step - 1
        return defaultdict(lambda: last)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def settings(self, stage: str, values: Mapping[str, Any]) -> None:
        self._run.config.update({stage: dict(values)}, allow_val_change=True)

    def results(self, values: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(values))

    def files(self, folder: Path) -> None:
        import wandb

        for path in _files(folder):
            if path.suffix in (".html", ".svg"):
                page = wandb.Html(path.read_text(), inject=False)
                self._run.log({str(path.relative_to(folder).with_suffix("")): page})
        # Copies, because it would link to the folder, which may be gone when an offline run is sent.
        shutil.copytree(folder, self._run.dir, dirs_exist_ok=True)
        for path in _files(folder):
            self._run.save(str(Path(self._run.dir, path.relative_to(folder))), base_path=self._run.dir, policy="now")

    def finish(self) -> None:
        self._run.finish()


class Mlflow(Tracker):
    """MLflow, at the server or store that MLFLOW_TRACKING_URI names."""

    name, package = "MLflow", "mlflow"

    def start(self) -> Mapping[str, int]:
        # Training does not wait, but a stopped run does.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        self._client = client = MlflowClient()
        existing = client.get_experiment_by_name(self.project)
        experiment = existing.experiment_id if existing else client.create_experiment(self.project)
        runs = client.search_runs([experiment], f"tags.`moelpr.run` = '{self.run}'")
        run = runs[0] if runs else client.create_run(experiment, run_name=self.run, tags={"moelpr.run": self.run})
        self._id, self._params = run.info.run_id, dict(run.data.params)
        client.update_run(self._id, status="RUNNING")
        return defaultdict(lambda: -1, {metric.key: metric.step for metric in run.data.to_proto().metrics})

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(re.sub(r"[^\w\-. /:]", "_", key), value, now, step) for key, value in values.items()]
        for part in batched(metrics, 1000):
            self._client.log_batch(self._id, part)

    def settings(self, stage: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        new = {
            key: str(value)[:6000] for name, value in values.items() if (key := f"{stage}.{name}") not in self._params
        }
        for part in batched(new.items(), 100):
            self._client.log_batch(self._id, params=[Param(*pair) for pair in part])
        self._params |= new

    def files(self, folder: Path) -> None:
        self._client.log_artifacts(self._id, str(folder))

    def finish(self) -> None:
        self._client.set_terminated(self._id, "FINISHED")


# Flag → tracker.
TRACKERS: dict[str, type[Tracker]] = {"wandb_project": Wandb, "mlflow_experiment": Mlflow}


def missing_packages(args: Any) -> list[str]:
    """A sentence for each tracker that the flags ask for and that is not installed."""
    return [
        f"--{flag.replace('_', '-')} needs {kind.name}, which is not installed; run {install_command(kind.package)}"
        for flag, kind in TRACKERS.items()
        if getattr(args, flag, None) and find_spec(kind.package) is None
    ]


def make_trackers(args: Any, run: str, folder: Path) -> list[Tracker]:
    """The trackers that the flags ask for."""
    return [
        kind(project, args, run, folder) for flag, kind in TRACKERS.items() if (project := getattr(args, flag, None))
    ]


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without credentials and hosts."""

    def public(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [public(item) for item in value]
        return redact(value) if isinstance(value, str) else value

    return {name: public(value) for name, value in settings.items() if not _PRIVATE_FLAG.search(name)}


def redact(text: str) -> str:
    """Text with *** in the place of passwords in addresses, and of credentials and hosts of this environment."""
    private = {socket.gethostname(), socket.getfqdn()}
    for name, value in os.environ.items():
        words = {*name.upper().split("_")}
        if words & _SECRET_NAMES and len(value) > 5 or words & _HOST_NAMES and len(value) > 1:
            private |= {value, *([match[1]] if (match := re.search(r"://(?:[^/@]*@)?([^/:]+)", value)) else [])}
    text = re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text)
    either = "|".join(map(re.escape, sorted(private, key=len, reverse=True)))
    return re.sub(rf"(?<!\w)(?:{either})(?!\w)", "***", text)


def _files(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
