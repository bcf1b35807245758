"""What the tasks of a workflow still need: memory and disk space."""

import shutil

from moelpr.base import machine
from moelpr.base.errors import MachineError
from moelpr.project.workflow.workflow import Workflow


def check_machine(workflow: Workflow) -> None:
    """Check that disk and memory can hold what the tasks that are not done need.

    Raises:
        MachineError: They are too small.
    """
    left = [task for task in workflow.tasks.values() if not workflow.is_done(task.name)]
    if not left:
        return
    disk = sum(task.disk_gib for task in left) * 2**30
    if (free := shutil.disk_usage(workflow.folder).free) < disk:
        raise MachineError(
            f"the disk of {workflow.folder} has {machine.format_bytes(free)} free, and the tasks that are left need "
            f"{machine.format_bytes(disk)}; free space, or choose another output folder"
        )
    largest = max(left, key=lambda task: task.memory_gib)
    memory = largest.memory_gib * 2**30
    if (free := machine.free_memory()) < memory:
        raise MachineError(
            f"{machine.format_bytes(free)} of memory are free, and task {largest.name} needs "
            f"{machine.format_bytes(memory)}; use a larger machine"
        )
