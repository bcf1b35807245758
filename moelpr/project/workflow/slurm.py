"""Submit the tasks of a workflow that are not done as a chain of Slurm jobs, each after those that it depends on.

For each there is a script, `slurm/TASK.sbatch` in the workflow's folder. Its job runs `moelpr run FILE --task TASK` on
each of its nodes, so it is decided again when it starts whether the task is done. No process stays on the login node.
"""

import getpass
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from moelpr.base.errors import CONTROL, MachineError, UserError, did_you_mean
from moelpr.base.files import remove, write_text
from moelpr.base.records import DOCUMENTED, STRICT, Record
from moelpr.base.tools import launch_folder
from moelpr.project.workflow.mark import shown
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Outlook, Workflow


def _as_option(value: Any) -> Any:
    if not isinstance(value, bool | int | str):
        raise UserError(f"expected a word, a number or true, got {value}")
    return value


def _seconds(time: str) -> float:
    """Seconds of a time as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; infinity if it is none of these."""
    days, _, rest = time.rpartition("-")
    units = (3600, 60, 1) if days or rest.count(":") == 2 else (60, 1)
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return math.inf
    return 86400 * int(days or 0) + sum(unit * int(part) for unit, part in zip(units, rest.split(":"), strict=False))


# Options by which jobs find each other, and those that follow from a task.
_OURS = "array", "dependency", "error", "job-name", "no-requeue", "ntasks", "ntasks-per-node", "output", "requeue"
Queue = dict[str, tuple[str, str]]  # number of a job → its name, and its state with the reason
Options = dict[str, Annotated[bool | int | str, BeforeValidator(_as_option)]]


@dataclass(frozen=True, config=DOCUMENTED)
class SlurmSettings:
    """Settings of jobs on a Slurm cluster."""

    options: Options = field(default_factory=dict)
    """Options of sbatch for all jobs, without dashes, such as partition, account, time."""
    training: Options = field(default_factory=dict)
    """Options for trainings only, such as signal: "B:USR1@1800" if a checkpoint takes longer than five minutes."""
    steps: dict[str, Options] = field(default_factory=dict)
    """Options for single steps: step → option → value; preprocess: of all languages."""
    container_image: str | None = None
    """Image for enroot with pyxis."""
    apptainer: str | None = None
    """Image for Apptainer, instead."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders that the container has, FROM:TO, besides the current one."""
    shards: Annotated[int, Field(ge=1, le=1000)] = 1  # an array's indices are below 1,001 unless the site raises that
    """Number of jobs among which the preprocessing of a language is divided."""

    def __post_init__(self) -> None:
        by_step = [(f"steps.{name}", options) for name, options in self.steps.items()]
        for place, options in (("options", self.options), ("training", self.training), *by_step):
            if bad := [name for name in options if not re.fullmatch("[a-z][a-z0-9-]*", name)]:
                raise UserError(f"slurm.{place} has {bad[0]}; write it as in cpus-per-task, without leading dashes")
            # A tool of several nodes would write one output several times.
            set_here = [*_OURS, "nodes"] if place == "options" else _OURS
            if ours := [name for name in set_here if name in options]:
                raise UserError(f"slurm.{place}.{ours[0]} is set by moelpr run; remove it")
            if not re.fullmatch(r"B:USR1@[1-9]\d*", str(options.get("signal", "B:USR1@300"))):
                raise UserError(f"slurm.{place}.signal must be B:USR1@SECONDS, got {options['signal']}; write it so")
        if self.container_image and self.apptainer:
            raise UserError("container_image and apptainer are both given; keep one")
        if self.container_mounts and not (self.container_image or self.apptainer):
            raise UserError("container_mounts requires container_image or apptainer; add one")
        if bad := [mount for mount in self.container_mounts if not re.match("/[^:]*:/", mount)]:
            raise UserError(f"container_mounts has {bad[0]}; write FROM:TO, both with a / in front")

    def options_of(self, task: Task) -> Options:
        """The options of a task's job, those of the user last."""
        options: Options = {"nodes": task.nodes, "ntasks-per-node": 1, "requeue": True, "open-mode": "append"}
        if task.gpus_per_node:
            options["gpus-per-node"] = task.gpus_per_node
        if task.continues:
            options |= {"exclusive": True, "mem": 0, "signal": "B:USR1@300"}
        else:
            options |= {"cpus-per-task": task.cpus, "mem": f"{max(1, math.ceil(task.memory_gib))}G"}
        own = self.steps.get(task.name.partition("-")[0], {}) | self.steps.get(task.name, {})
        return options | self.options | (self.training if task.continues else {}) | own

    def container(self) -> list[str]:
        """The container options of Slurm's scripts (launch/slurm/lib.sh)."""
        words = ["--container-image", self.container_image] if self.container_image else []
        words += ["--apptainer", self.apptainer] if self.apptainer else []
        return words + [word for mount in self.container_mounts for word in ("--container-mounts", mount)]


@dataclass(frozen=True, config=STRICT)
class SlurmJob:
    """A job that was submitted.

    Attributes:
        id: Its number.
        made_as: ID that the task's output will have; null if results of other tasks decide its command.
        user: Who submitted it.
    """

    id: str
    made_as: str | None
    user: str = ""


@dataclass(frozen=True, config=STRICT)
class SlurmJobs(Record):
    """The last job of each task of a workflow, `slurm/jobs.json` in its folder.

    Attributes:
        jobs: Task, or TASK-shards, → job.
    """

    FILE_NAME: ClassVar[str] = "slurm/jobs.json"
    REMEDY: ClassVar[str] = "cancel the jobs that are left, and remove it"

    jobs: dict[str, SlurmJob] = field(default_factory=dict)


class Chain:
    """The jobs of a workflow on a cluster."""

    def __init__(self, workflow: Workflow, settings: SlurmSettings, file: Path) -> None:
        """`file`: The languages.yaml."""
        self._workflow, self._settings, self._file = workflow, settings, file
        self._folder = workflow.folder.resolve() / "slurm"
        self._name = re.sub(r"[^\w.-]", "-", self._folder.parent.name)
        self._jobs = dict((SlurmJobs.read_if_there(workflow.folder) or SlurmJobs()).jobs)
        self._active: dict[str, str] = {}  # task → its job that starts or ends later
        self._render_only = False

    def refuse_active(self) -> None:
        """Raise a UserError if jobs of an earlier call are pending or running."""
        queued = self._queued()
        active = [job.id for name, job in self._jobs.items() if self._state(queued, job, name)]
        if active:
            what = f"jobs of {self._folder.parent} are pending or running"
            raise UserError(f"{what}; wait for them, or cancel them (scancel {' '.join(active)})")

    def states(self, done: Collection[str]) -> dict[str, str]:
        """The last job of each task that is not done: its state, or its log."""
        if not self._jobs or not shutil.which("squeue"):
            return {}
        try:
            queued = self._queued()
        except MachineError as error:
            return {name.removesuffix("-shards"): f"job {job.id}: {error}" for name, job in self._jobs.items()}
        found: dict[str, list[tuple[int, str]]] = {}  # an array of shards is before the job that joins them
        for name, job in self._jobs.items():
            task, state = name.removesuffix("-shards"), self._state(queued, job, name)
            logs = sorted(self._folder.glob(f"{self._name}-{name}-[0-9]*.log"), key=lambda path: path.stat().st_mtime)
            text = state or (f"ended, see {logs[-1]}" if logs else "ended without a log, so it was canceled")
            rank = 0 if state else 3 if not logs else 1 if name == task else 2
            if task not in done:
                found.setdefault(task, []).append((rank, f"job {job.id}{'' if name == task else ' (shards)'} {text}"))
        return {task: min(its, key=lambda one: one[0])[1] for task, its in found.items()}

    def _state(self, queued: Queue, job: SlurmJob, name: str) -> str:
        """The state of a task's job; empty unless it is queued or runs."""
        its_name, state = queued.get(job.id, ("", ""))
        return state if its_name == f"{self._name}-{name}" else ""

    def submit(self, *, render_only: bool = False) -> None:
        """Submit what is not done, or only write the scripts.

        Raises:
            UserError: sbatch refuses a job, or a task's job of an earlier call would do another command.
        """
        self._render_only = render_only
        self.check_steps()
        outlooks = self._workflow.outlook_of_jobs()
        if not render_only:
            self.check_queue(outlooks)
            self._workflow.set_aside()
        for outlook in outlooks:
            name = outlook.task.name
            if outlook.state == "done":
                print(f"{name}: done")
            elif name in self._active:
                print(f"{name}: job {self._active[name]} is pending or running")
            else:
                if outlook.reason:
                    print(f"{name}: again, because {outlook.reason}")
                self._submit_task(outlook)

    def check_steps(self) -> None:
        """Raise a UserError for options of a step that there is not."""
        names = [*dict.fromkeys(part for task in self._workflow.tasks for part in (task, task.partition("-")[0]))]
        if name := min(self._settings.steps.keys() - names, default=None):
            raise UserError(f"slurm.steps.{name} is no step; {did_you_mean(name, names, ', '.join(names))}")

    def _submit_task(self, outlook: Outlook) -> None:
        task, name = outlook.task, outlook.task.name
        shards = self._settings.shards if task.corpora and outlook.id else 1
        if shards > 1:
            self._submit_shards(outlook, shards)
        run = ["run", str(self._file), "--task", name]
        run += ["--made-as", str(outlook.id)] if shards > 1 else []
        lines = [f"run_tool -m moelpr {shlex.join(run)}"]
        if task.continues:
            save = shlex.quote(str(task.continues))
            lines = [f'run_training "$(path_outside {save})" -m moelpr {shlex.join(run)}']
            lines = ["IS_SPARE=yes", *lines] if task.is_spare else lines
        elif shards > 1:
            mark = shlex.quote(str(self._workflow.mark_path(name).resolve()))  # describes what is replaced
            lines = [f"rm -f {mark}", *(_joining(corpus, shards) for corpus in task.corpora), *lines]
        self._submit(name, outlook, lines)

    def _check_time(self, task: Task) -> None:
        options = self._settings.options_of(task)
        grace = int(str(options.get("signal", "")).partition("@")[2] or 0)
        if _seconds(str(options.get("time"))) <= grace:
            raise UserError(
                f"slurm.options.time: {options['time']} for {task.name} is not longer than the {grace} s before "
                'its end when a training saves; raise it, or set slurm.training: {signal: "B:USR1@60"}'
            )

    def check_queue(self, outlooks: list[Outlook]) -> dict[str, str]:
        """The jobs that are queued, by task; raise a UserError for what cannot be submitted, before anything is."""
        self.check_steps()
        for image in map(Path, filter(None, (self._settings.apptainer, self._settings.container_image))):
            if image.suffix in (".sif", ".sqsh") and not image.exists():
                raise UserError(f"slurm: there is no image {image}; correct the path")
        queued, changed, joining = self._queued(), list[str](), dict[str, str]()
        to_do = {one.task.name: one for one in outlooks if one.state != "done"}
        for name, outlook in to_do.items():
            self._check_time(outlook.task)
            job, shards = self._jobs.get(name), self._jobs.get(f"{name}-shards")
            if job and self._state(queued, job, name):
                self._active[name] = job.id
                is_other = job.made_as and outlook.id and job.made_as != outlook.id
                is_other = is_other or self._has_other_options(outlook.task)
                # Tasks are in an order in which they can run, so that all that it could wait for is known.
                if is_other or any(need in to_do and need not in self._active for need in outlook.task.inputs):
                    changed.append(name)
            elif shards and self._state(queued, shards, f"{name}-shards"):
                joining[name] = shards.id
        if joining:
            raise UserError(
                f"shards of {', '.join(joining)} are pending or running; wait for them, or cancel them "
                f"(scancel {' '.join(joining.values())})"
            )
        if changed:
            both = [one for name in changed for one in (f"{name}-shards", name) if one in self._jobs]
            ids = [self._jobs[one].id for one in both if self._state(queued, self._jobs[one], one)]
            raise UserError(
                f"jobs of {', '.join(changed)} are pending or running, but their options, or what they do or wait for "
                f"has changed since; cancel them (scancel {' '.join(ids)}), or wait for their end"
            )
        return self._active

    def _queued(self) -> Queue:
        has_jobs = self._jobs and shutil.which("squeue")
        return queued_jobs({job.user for job in self._jobs.values()}) if has_jobs else {}

    def _submit_shards(self, outlook: Outlook, shards: int) -> None:
        """Submit an array for the shards that are missing: all, if what there is is another command's."""
        task, name = outlook.task, f"{outlook.task.name}-shards"
        before = self._jobs.get(name)
        missing = [*range(shards)]
        if before and before.made_as == outlook.id:
            missing = [number for number in missing if not _shard(task.corpora[0], number, shards).exists()]
        elif not self._render_only:
            for corpus in task.corpora:
                for path in corpus.parent.glob(f"{corpus.name}.shard-*"):
                    remove(path)
            for folder in task.unfinished:
                for path in folder.parent.glob(f"{folder.stem}.shard-*{folder.suffix}"):
                    remove(path)
        if missing:
            words = [*task.words(), *map(str, task.settings), "--num-shards", str(shards)]
            line = f'run_tool -m {shlex.join(words)} --shard "$SLURM_ARRAY_TASK_ID"'
            self._submit(name, outlook, [line], array=",".join(map(str, missing)))

    def _submit(self, name: str, outlook: Outlook, lines: list[str], **options: bool | int | str) -> None:
        """Write a job's script, submit it, and record and print its number."""
        task = outlook.task
        path = self._folder / f"{name}.sbatch"
        write_text(path, self._script(name, task, lines, self._settings.options_of(task) | options))
        if self._render_only:
            print(f"{name}: {path}")
            return
        needs = dict.fromkeys((*task.inputs, f"{task.name}-shards"))
        ids = [self._active[need] for need in needs if need in self._active]
        words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
        words += [f"--dependency=afterok:{':'.join(ids)}"] if ids else []
        done = subprocess.run([*words, str(path)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            printed = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in printed if "error: " in line), printed[0]).removeprefix("sbatch: error: ")
            raise UserError(f"Slurm refuses {path} ({reason}); correct the settings under slurm and run it again")
        number = done.stdout.strip().split(";")[0]  # "id;cluster" on a federation
        self._active[name] = number
        self._jobs[name] = SlurmJob(number, outlook.id, getpass.getuser())
        SlurmJobs(self._jobs).write(self._workflow.folder)
        print(f"{name}: job {number}" + (f", after {':'.join(ids)}" if ids else ""))

    def _directives(self, name: str, options: Options) -> list[str]:
        values = {"job-name": f"{self._name}-{name}", "output": f"{self._folder}/%x-%j.log"} | options
        return [
            _comment("SBATCH", f"--{key}" + ("" if value is True else f"={shlex.quote(str(value))}"))
            for key, value in values.items()
            if value is not False
        ]

    def _has_other_options(self, task: Task) -> bool:
        path = self._folder / f"{task.name}.sbatch"
        before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        now = self._directives(task.name, self._settings.options_of(task))
        return bool(before) and now != [line for line in before if line.startswith("#SBATCH ")]

    def _script(self, name: str, task: Task, lines: list[str], options: Options) -> str:
        try:
            command = shown([*task.words(), *map(str, task.settings)])
        except UserError:
            command = "a command that results of other tasks decide"
        container = self._settings.container()
        grace = str(options.get("signal", "")).partition("@")[2]
        return "\n".join(
            [
                "#!/usr/bin/env bash",
                _comment("", f"{name} of {self._file}: {' '.join(command.splitlines())}"),
                *self._directives(name, options),
                "set -euo pipefail",
                f"cd {shlex.quote(str(Path.cwd()))}",
                f". {shlex.quote(str(launch_folder() / 'slurm' / 'lib.sh'))}",
                *([] if container else [f"export MOELPR_PYTHON={shlex.quote(sys.executable)}"]),
                *([f"export MOELPR_GRACE_SECONDS={grace}"] if grace.isdecimal() else []),
                f"read_container_options {shlex.join(container)}".rstrip(),
                *lines,
                "",
            ]
        )


def _comment(word: str, text: str) -> str:
    """A comment or directive of a script: one line, as what follows it would be a command."""
    if CONTROL.search(text):
        raise UserError(f"{text!r} has a control character, which a job script can't name; rename the folder or option")
    return f"#{word} {text}"


def queued_jobs(users: Iterable[str] = ()) -> Queue:
    """Jobs of users, by default this one, that are pending or running."""
    names = ",".join(sorted({getpass.getuser(), *users} - {""}))
    words = ["squeue", "--noheader", f"--user={names}", "--format", "%F %j %T (%r)"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MachineError(f"squeue fails ({done.stderr.strip()}); try again when Slurm answers")
    jobs = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    return {job[0]: (job[1], job[2].replace(" (None)", "")) for job in jobs if len(job) == 3}


def _shard(corpus: Path, number: int, shards: int) -> Path:
    return corpus.with_name(f"{corpus.name}.shard-{number:05d}-of-{shards:05d}.idx")


def _joining(corpus: Path, shards: int) -> str:
    """A line that joins shards, unless an interrupted job has."""
    words = ["moelpr", "data", "merge", "--output-prefix", str(corpus), "--num-shards", str(shards)]
    first = shlex.quote(str(_shard(corpus, 0, shards)))
    return f"[[ ! -e {first} ]] || (run_tool -m {shlex.join(words)} --remove-input --overwrite)"
