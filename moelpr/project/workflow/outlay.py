"""What the tasks of a chain still need: time, memory and disk space."""

import shutil
from collections.abc import Iterable, Sequence

from moelpr.base import machine
from moelpr.base.errors import MachineError
from moelpr.base.text_tables import table_text
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow


def listing(workflow: Workflow, tasks: Sequence[Task]) -> str:
    """A table of tasks with their times, and the time that is left."""
    done = workflow.wall_times_s()
    rows = []
    for task in tasks:
        minutes = done.get(task.name, task.minutes * 60) / 60
        rows.append([task.name, "done" if task.name in done else "", f"{minutes:.0f} min"])
    table = table_text(["task", "state", "took, or expected"], rows, text_columns=(0, 1))
    left = sum(task.minutes for task in tasks if task.name not in done)
    return f"{table}\n\nleft: about {left / 60:.1f} hours"


def check_machine(
    workflow: Workflow, tasks: Iterable[Task], *, scale: float = 1.0, spare_disk_gib: float = 0.0, remedy: str
) -> None:
    """Check that disk and memory can hold what the tasks that are not done need.

    Args:
        scale: What the tasks need, as a multiple of what they state.
        spare_disk_gib: More disk space, while an output replaces another one; also scaled.
        remedy: What the user can do except for freeing space.

    Raises:
        MachineError: They are too small.
    """
    left = [task for task in tasks if not workflow.is_done(task.name)]
    if not left:
        return
    disk = scale * (sum(task.disk_gib for task in left) + spare_disk_gib) * 2**30
    if (free := shutil.disk_usage(workflow.folder).free) < disk:
        raise MachineError(
            f"the disk of {workflow.folder} has {machine.format_bytes(free)} free, and the tasks that are left need "
            f"{machine.format_bytes(disk)}; free space, or {remedy}"
        )
    largest = max(left, key=lambda task: task.memory_gib)
    memory = scale * largest.memory_gib * 2**30
    if (free := machine.free_memory()) < memory:
        raise MachineError(
            f"{machine.format_bytes(free)} of memory are free, and task {largest.name} needs "
            f"{machine.format_bytes(memory)}; use a larger machine, or {remedy}"
        )
