"""Run a project: say what will be done again, then do it here or submit it; or do one step on a node of a cluster."""

from collections.abc import Callable, Sequence

from moelpr.base import ranks
from moelpr.base.errors import UserError
from moelpr.base.files import LOCK_FILE, locked, make_folder, write_text
from moelpr.base.versions import require_package
from moelpr.project.budget import check_budget
from moelpr.project.resolved import PLAN_FILE, ResolvedProject
from moelpr.project.steps.steps import check_flags, workflow_of
from moelpr.project.tables import changes, plan
from moelpr.project.verdict import verdict
from moelpr.project.workflow import kubernetes, skypilot, slurm
from moelpr.project.workflow.workflow import Outlook, Workflow


def run(
    project: ResolvedProject,
    redo: str | None = None,
    on: str = "local",
    *,
    is_dry: bool = False,
    render_only: bool = False,
) -> None:
    """Do all steps that are not done: on this machine in order, or as jobs of a cluster.

    Args:
        on: "local", or a key of `SUBMIT`.
        is_dry: Only print the steps and their commands; start, submit and write nothing.
        render_only: Write the files for the cluster, but submit nothing.
    """
    file = project.file
    if on == "local" and render_only:
        raise UserError(
            f"--render-only writes the jobs of a cluster; add --on {'|'.join(SUBMIT)}, or pass --dry-run to see the "
            "commands for this machine"
        )
    if on != "local" and file.project.hardware.gpu == "auto":
        raise UserError(
            f"{file.at('hardware')}hardware.gpu is auto, which is this machine; name the cluster's, such as hardware: "
            "{gpu: h100-80, gpus: 16}, or gpu: none for CPUs"
        )
    workflow = workflow_of(project, redo)
    outlooks = workflow.outlook()
    if on != "local" and any(x.task.name == "combine" and x.state != "done" for x in outlooks):
        workflow = workflow_of(project := ResolvedProject(file, is_judged=False), redo)
        outlooks = workflow.outlook()
    print(changes(outlooks), end="")
    check(project, outlooks)
    if is_dry:
        for outlook in outlooks:
            print(f"{outlook.task.name}: {outlook.state}\n    {command(workflow, outlook)}")
        if on != "local":
            print(f"{sum(outlook.state != 'done' for outlook in outlooks)} steps would be submitted to {on}.")
        return
    if on == "local" and project.method == "lora":
        require_package("peft", "lora")
    if on == "local" and all(outlook.state == "done" for outlook in outlooks):  # also where nothing can be written
        print("".join(f"{outlook.task.name}: already done\n" for outlook in outlooks) + verdict(project))
        return
    make_folder(workflow.folder)
    if project.trackers and not (path := project.folder / PLAN_FILE).exists():  # later plans have only what is left
        write_text(path, plan(project) + "\n")
    with locked(workflow.folder / LOCK_FILE, workflow.folder):
        if on != "local":
            if not render_only:
                workflow.set_aside(outlooks)
                if on == "slurm":  # its nodes often have no network
                    workflow.run(task for task in workflow.tasks.values() if task.name == "download")
            return SUBMIT[on](workflow, getattr(file.project, on), file.path, render_only=render_only)
        slurm.Chain(workflow, file.project.slurm, file.path).refuse_active()
        workflow.check_machine()
        if project.method == "auto":  # its routers decide what follows
            names = [*workflow.tasks]
            workflow.run(workflow.tasks[name] for name in names[: names.index("combine") + 1])
            workflow = workflow_of(ResolvedProject(file), redo)
        workflow.run()
    print(verdict(ResolvedProject(file)))


SUBMIT: dict[str, Callable[..., None]] = {
    "slurm": slurm.launch,
    "kubernetes": kubernetes.launch,
    "skypilot": skypilot.launch,
}


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


def check(project: ResolvedProject, outlooks: Sequence[Outlook]) -> None:
    """Check what can be known before anything runs.

    Raises:
        UserError: A training would be done again, a flag of a step is unknown, or the budget does not fit the text.
    """
    file = project.file
    check_flags(file, {outlook.task.name for outlook in outlooks if outlook.state != "done"})
    check_budget(project)
    for outlook in outlooks:
        task = outlook.task
        if task.shared and outlook.refusal:
            raise UserError(outlook.refusal)
        if outlook.refusal:
            raise UserError(
                f"{outlook.refusal.rpartition(';')[0]}; undo the edit of {file.path}, pass --redo {task.name} to train "
                "again (what it has trained is kept), or remove "
                f"{project.folder / 'logs' / task.name}.json to continue it with the new settings"
            )


def command(workflow: Workflow, outlook: Outlook) -> str:
    try:
        return workflow.command_line(outlook.task)
    except UserError as error:
        return f"decided when its turn comes ({error})"
