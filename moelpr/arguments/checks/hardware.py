"""What this machine has: GPUs, which PyTorch must be able to use, and without GPUs memory."""

from collections.abc import Iterable

import torch

from moelpr.arguments.memory import expected_memory, smaller_settings
from moelpr.arguments.requested import RequestedRun
from moelpr.megatron_patches import cpu
from moelpr.plan.gpus import RESERVED_FRACTION
from moelpr.process import machine, ranks


def check_gpus(run: RequestedRun) -> Iterable[str]:
    """Otherwise a run for GPUs would silently use the CPU."""
    if problem := cpu.unusable_gpus():
        yield problem


def note_memory(run: RequestedRun) -> Iterable[str]:
    """The planner expects a rank to need more than its GPU has, or the ranks more than a machine without GPUs has."""
    if (expected := expected_memory(run)) is None:
        return
    if not cpu.is_needed():
        total = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
        if expected > (1 - RESERVED_FRACTION) * total:
            yield (
                f"warning: a rank may need {machine.format_bytes(expected)}, and a GPU here has "
                f"{machine.format_bytes(total)}, of which {RESERVED_FRACTION:.0%} are left for what is not counted; if "
                f"it runs out of memory, use {smaller_settings(run)}, or a layout of python -m moelpr.plan"
            )
        return
    # The kernel would kill a rank, where a GPU reports an error.
    number = ranks.local_world_size()
    if number * expected > (free := machine.free_memory()):
        yield (
            f"warning: this machine has {machine.format_bytes(free)} of free memory, and {number} "
            f"rank{'s' if number > 1 else ''} of {machine.format_bytes(expected)} may need more; if one is killed, use "
            f"{smaller_settings(run)}"
        )
