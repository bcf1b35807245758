"""Run a project: say what will be done again, then do it here or submit it; or do one step on a node of a cluster."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moelpr.base import ranks
from moelpr.base.errors import UserError
from moelpr.base.files import LOCK_FILE, locked, make_folder, write_text
from moelpr.base.versions import require_package
from moelpr.data.text.remote import is_remote
from moelpr.model.families.hf_config import check_model
from moelpr.model.families.hub import download, is_on_hub
from moelpr.project.budget import check_budget
from moelpr.project.file import ProjectFile
from moelpr.project.resolved import PLAN_FILE, ResolvedProject
from moelpr.project.steps.steps import workflow_of
from moelpr.project.steps.text import MODEL_FILES
from moelpr.project.tables import changes, plan
from moelpr.project.verdict import verdict
from moelpr.project.workflow import kubernetes, skypilot, slurm
from moelpr.project.workflow.workflow import Outlook, Workflow
from moelpr.train.track.trackers import TRACKERS


def run_here(project: ResolvedProject, redo: str | None = None) -> None:
    """Do all steps that are not done, in order, on this machine.

    Args:
        redo: Training to start again after an edit, with those after it.
    """
    workflow, outlooks = checked(project, redo)
    _require_packages(project)
    if all(outlook.state == "done" for outlook in outlooks):  # also where nothing can be written
        print("".join(f"{outlook.task.name}: already done\n" for outlook in outlooks) + verdict(project))
        return
    file = project.file
    with _locked_folder(project, workflow):
        slurm.Chain(workflow, file.project.slurm, file.path).refuse_active()
        workflow.check_machine()
        if project.method == "auto":  # its routers decide what follows
            names = [*workflow.tasks]
            workflow.run(workflow.tasks[name] for name in names[: names.index("combine") + 1])
            judged = ResolvedProject(file)
            if judged.why_reviewed:
                print(f"A review of the routers follows, as the second FFN {judged.why_reviewed}.")
            later = workflow_of(judged, redo)
            later.started, workflow, done = workflow.started, later, names.index("combine") + 1
            workflow.run([*workflow.tasks.values()][done:])
        else:
            workflow.run()
    print(verdict(ResolvedProject(file)))


SUBMIT: dict[str, Callable[..., None]] = {
    "slurm": lambda *project, render_only: slurm.Chain(*project).submit(render_only=render_only),
    "kubernetes": kubernetes.launch,
    "skypilot": skypilot.launch,
}
_PROGRAMS = {"slurm": "sbatch", "kubernetes": "kubectl", "skypilot": "sky"}


def submit(project: ResolvedProject, where: str, redo: str | None = None, *, render_only: bool = False) -> None:
    """Submit all steps that are not done as jobs of a cluster.

    Args:
        where: A key of `SUBMIT`.
        render_only: Write the files for the cluster, but submit nothing.

    Raises:
        UserError: The cluster's program or settings are missing, or what `checked` raises.
    """
    file = project.file
    if not render_only and not shutil.which(_PROGRAMS[where]):
        raise UserError(f"{_PROGRAMS[where]} is not installed; run this where it is, or pass --render-only")
    project = _for_jobs(project, where, redo)
    workflow, outlooks = checked(project, redo)
    to_slurm = where == "slurm" and not render_only
    if to_slurm and not file.project.slurm.container():
        _require_packages(project)  # jobs use this Python
    with _with_line(file), _locked_folder(project, workflow):
        if to_slurm:
            slurm.Chain(workflow, file.project.slurm, file.path).check_queue(outlooks)
            _fetch(project, workflow)
        SUBMIT[where](workflow, getattr(file.project, where), file.path, render_only=render_only)
    if to_slurm:
        print(f"moelpr status {shlex.quote(str(file.path))} shows them; their logs are in {workflow.folder}/slurm.")


def _require_packages(project: ResolvedProject) -> None:
    if project.method == "lora":
        require_package("peft", "lora")
    if project.content.benchmarks:
        require_package("lm_eval", "eval")
    for flag, tracker in TRACKERS.items():
        if getattr(project.content.trackers, flag):
            require_package(tracker.package, tracker.package)


def _fetch(project: ResolvedProject, workflow: Workflow) -> None:
    """Fetch the models and the text to keep, since nodes often have no network; name other text that they read."""
    workflow.run(task for task in workflow.tasks.values() if task.name in ("download", "kept"))
    chat = project.content.chat
    if chat and is_on_hub(chat):
        download(chat, MODEL_FILES, "chat model")
    languages = project.languages.values()
    names = (name for one in languages for name in [*one.text, *one.conversations, one.held_out or ""])
    if uri := next(filter(is_remote, names), None):
        print(
            f"note: jobs read {uri} themselves; if nodes have no network, name a copy (docs/slurm.md)", file=sys.stderr
        )


def show(project: ResolvedProject, where: str, redo: str | None = None) -> None:
    """Print the steps and their commands; start, submit and write nothing.

    Args:
        where: "local", or a key of `SUBMIT`.
    """
    workflow, outlooks = checked(project if where == "local" else _for_jobs(project, where, redo), redo)
    chain = slurm.Chain(workflow, project.content.slurm, project.file.path)
    with _with_line(project.file):
        queued = chain.check_queue(outlooks) if where == "slurm" else {}
    is_first = True
    for outlook in outlooks:
        try:
            command = workflow.command_line(outlook.task)
        except UserError as error:
            command = f"decided when its turn comes{f' ({error})' if is_first else ', by what earlier steps make'}"
        is_first &= outlook.state == "done"
        print(f"{outlook.task.name}: {outlook.state}\n    {command}")
    if where != "local":
        number = sum(outlook.state != "done" and outlook.task.name not in queued for outlook in outlooks)
        print(f"{number} steps would be submitted to {where}" + (f"; {len(queued)} are queued." if queued else "."))


@contextmanager
def _with_line(file: ProjectFile) -> Iterator[None]:
    """Name the line of the key with which the message of a UserError begins."""
    try:
        yield
    except UserError as error:
        key = re.split("[.: ]+", str(error))
        has_line = str(error).startswith(f"{file.path}, ")
        raise UserError(f"{'' if has_line or not hasattr(file.project, key[0]) else file.at(*key)}{error}") from None


def _for_jobs(project: ResolvedProject, where: str, redo: str | None) -> ResolvedProject:
    """The project on a cluster, which its file must name; routers that are to be made again decide nothing yet."""
    file, content = project.file, project.content
    with _with_line(file):
        if where == "kubernetes":
            texts = [path for _, one in content.languages for path in (*one.text, *one.conversations, one.held_out)]
            paths = {key: [getattr(content, key)] for key in ("output", "text_output", "model", "chat")}
            kubernetes.check(content.kubernetes, paths | {"languages": [*texts, *content.languages.kept.values()]})
        elif where == "skypilot":
            skypilot.check(content.skypilot)
        if content.hardware.gpu == "auto":
            raise UserError(
                "hardware.gpu is auto, which is this machine; name the cluster's, such as hardware: {gpu: h100-80, "
                "gpus: 16}, or gpu: none for CPUs"
            )
        if content.hardware.gpu != "none" and not content.hardware.gpus:
            raise UserError("hardware.gpus is missing, the number of GPUs of a training; add it, such as gpus: 8")
    _ = project.layouts.result  # as in `checked`
    outlooks = workflow_of(project, redo).outlook()
    is_judged = all(outlook.state == "done" for outlook in outlooks if outlook.task.name == "combine")
    return project if is_judged else ResolvedProject(file, is_judged=False)


@contextmanager
def _locked_folder(project: ResolvedProject, workflow: Workflow) -> Iterator[None]:
    """Keep other runs from the project's folder, which has its plan for trackers."""
    make_folder(workflow.folder)
    if project.trackers and not (path := project.folder / PLAN_FILE).exists():  # later plans have only what is left
        write_text(path, plan(project) + "\n")
    with locked(workflow.folder / LOCK_FILE, workflow.folder):
        yield


def run_task(workflow: Workflow, name: str, made_as: str | None = None) -> None:
    """Do one step as a job of a cluster, on each of its nodes.

    Args:
        made_as: Jobs have made its output already, and this is the ID that it should have.
    """
    if name not in workflow.tasks:
        raise UserError(f"there is no step {name}; the steps are {', '.join(workflow.tasks)}")
    if made_as:
        return workflow.adopt(name, made_as)
    workflow.perform(name, is_leader=ranks.node_rank() == 0)


def checked(project: ResolvedProject, redo: str | None) -> tuple[Workflow, list[Outlook]]:
    """Say what will be done again, and check what can be known before anything runs.

    Raises:
        UserError: A training would be done again, the budget does not fit the text, or a model has no weights.
    """
    _ = project.layouts.result  # reads the base, so that all stages are checked where their tasks are made
    workflow = workflow_of(project, redo)
    outlooks = workflow.outlook()
    print(changes(outlooks), end="")
    check_budget(project)
    for name in (project.content.model, project.content.chat):
        if name and not is_on_hub(name):
            check_model(Path(name), is_hf=True)
    for outlook in outlooks:
        task = outlook.task
        if task.missing and outlook.state != "done":
            raise task.missing
        if task.shared and outlook.refusal:
            raise UserError(outlook.refusal)
        if outlook.refusal:
            raise UserError(
                f"{outlook.refusal.rpartition(';')[0]}; undo that, pass --redo {task.name} to train again (what it has "
                f"trained is kept), or remove {project.folder}/logs/{task.name}.json to continue with the new settings"
            )
    return workflow, outlooks
