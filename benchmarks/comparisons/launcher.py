"""The time from the start of launch/stage1.sh to that of the trainer, against plain torchrun's.

Both start with the same Python and the same arguments, until the last rank's Python runs, which then ends at once: the
start of the trainer is not included.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import ROOT, environment
from benchmarks.timing import Times, Turns

# Python imports a module of this name before any other: a rank writes down the time and ends.
SITECUSTOMIZE = """
import os, time
if "LOCAL_RANK" in os.environ:
    with open(os.environ["STARTED"], "a") as file:
        file.write(f"{time.time()}\\n")
    os._exit(0)
"""


DEFAULTS = {"ranks": 1}


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    ranks = ["--nproc-per-node", str(settings.ranks)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks]
    commands = {
        "torchrun": [*torchrun, "-m", "moelpr.pretrain", "--stage", "stage1"],
        "launcher": [str(ROOT / "launch" / "stage1.sh"), *ranks],
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(SITECUSTOMIZE)
        times = turns.take(commands, lambda command: until_ranks_start(command, Path(folder))[turns.cpu_time])
        yield f"ranks: {settings.ranks}", times


def until_ranks_start(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds until the last rank runs its first line of Python, and CPU seconds until all processes have ended."""
    started = folder / "started"
    started.unlink(missing_ok=True)
    variables = environment(STARTED=str(started), OMP_NUM_THREADS="1")
    variables["PYTHONPATH"] = f"{folder}{os.pathsep}{variables['PYTHONPATH']}"
    before, start = os.times(), time.time()
    subprocess.run(command, env=variables, check=True, capture_output=True, timeout=120)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return max(map(float, started.read_text().split())) - start, cpu_s
