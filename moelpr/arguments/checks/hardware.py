"""The memory of this machine, where no GPU reports that it is full: the kernel kills a rank."""

import os
from collections.abc import Iterable

from moelpr import machine
from moelpr.arguments.memory import expected_memory, smaller_settings
from moelpr.arguments.settings import RunSettings
from moelpr.megatron_patches import cpu


def note_cpu_memory(run: RunSettings) -> Iterable[str]:
    """The ranks of this machine need more than is free."""
    expected = expected_memory(run) if cpu.is_needed() else None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if expected is not None and ranks * expected > (free := machine.free_memory()):
        yield (
            f"warning: this machine has {machine.as_gib(free)} of free memory, and {ranks} "
            f"rank{'s' if ranks > 1 else ''} of {machine.as_gib(expected)} may need more; if one is killed, use "
            f"{smaller_settings(run)}"
        )
