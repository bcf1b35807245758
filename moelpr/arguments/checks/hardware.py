"""What this machine has: GPUs, which PyTorch must be able to use, and without GPUs memory."""

import os
from collections.abc import Iterable

from moelpr import machine
from moelpr.arguments.memory import expected_memory, smaller_settings
from moelpr.arguments.settings import RunSettings
from moelpr.megatron_patches import cpu


def check_gpus(run: RunSettings) -> Iterable[str]:
    """Otherwise a run for GPUs would silently use the CPU."""
    if problem := cpu.unusable_gpus():
        yield problem


def note_cpu_memory(run: RunSettings) -> Iterable[str]:
    """The ranks of this machine need more than is free, and the kernel would kill one, where a GPU reports an error."""
    expected = expected_memory(run) if cpu.is_needed() else None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if expected is not None and ranks * expected > (free := machine.free_memory()):
        yield (
            f"warning: this machine has {machine.as_gib(free)} of free memory, and {ranks} "
            f"rank{'s' if ranks > 1 else ''} of {machine.as_gib(expected)} may need more; if one is killed, use "
            f"{smaller_settings(run)}"
        )
