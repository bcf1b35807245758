"""Does a run that resumes under a different layout equal an uninterrupted run?

    python -m tests.distributed.resume_layouts [--only REGEX] [--json FILE]

Trains a few steps of each stage under the first layout of each pair, resumes under the second for as many again, and
compares the result with one process that trained all steps. CPU ranks, gloo, fp32. Exits with code 1 if a pair is off
by more than 1e-5.
"""

import re
import shutil
from collections import defaultdict
from pathlib import Path

from tests.distributed import layout_runs
from tests.distributed.layout_runs import EP2, OPTIMIZER, PP2, STAGES, STEPS, TP2, TP2_ETP1, VPP2, Commands, Layout

RESHARDABLE = f"{OPTIMIZER} --dist-ckpt-optim-fully-reshardable"

# Name -> layout before, layout after. The first rows save optimizer state by parameter, the middle ones as flat buffers
# (which support only a different data-parallel size), the last ones by parameter again.
PAIRS = {
    "1 -> EP2": (Layout(1, ""), Layout(2, EP2)),
    "EP2 -> 1": (Layout(2, EP2), Layout(1, "")),
    "TP2+SP ETP2 -> PP2": (Layout(2, TP2), Layout(2, PP2)),
    "PP2 -> TP2+SP EP2": (Layout(2, PP2), Layout(2, f"{TP2_ETP1} {EP2}")),
    "distributed optimizer, DP2 -> 1": (Layout(2, OPTIMIZER), Layout(1, OPTIMIZER)),
    "distributed optimizer, 1 -> DP2": (Layout(1, OPTIMIZER), Layout(2, OPTIMIZER)),
    "reshardable, DP2 -> EP2": (Layout(2, RESHARDABLE), Layout(2, f"{EP2} {RESHARDABLE}")),
    "reshardable, EP2 -> PP2 VPP2": (Layout(2, f"{EP2} {RESHARDABLE}"), Layout(2, f"{PP2} {VPP2} {RESHARDABLE}")),
    "reshardable, PP2 -> TP2+SP ETP2": (Layout(2, f"{PP2} {RESHARDABLE}"), Layout(2, f"{TP2} {RESHARDABLE}")),
    "reshardable, TP2+SP ETP2 -> 1": (Layout(2, f"{TP2} {RESHARDABLE}"), Layout(1, RESHARDABLE)),
}


def measure(folder: Path, only: str) -> list[dict]:
    """Train the pairs and the uninterrupted run, in one launch per half and number of ranks."""
    shutil.rmtree(folder / "resumed", ignore_errors=True)
    for half, commands in enumerate(halves(folder, only)):
        layout_runs.launch_all(folder, commands, f"half-{half}")
    return rows(folder, only)


def halves(folder: Path, only: str) -> tuple[Commands, Commands]:
    """The trainings of the pairs until they stop, with the uninterrupted run, and those after it."""
    actual: tuple[Commands, Commands] = (defaultdict(list), defaultdict(list))
    for stage in STAGES:
        steps = ["--train-iters", str(2 * STEPS)]
        uninterrupted = layout_runs.trainer_arguments(folder, Layout(1, ""), stage, _save(folder, "whole", stage))
        actual[0][1].append([*uninterrupted, *steps])
        for name in _chosen(only):
            for half, layout in enumerate(PAIRS[name]):
                stop = [] if half else ["--exit-interval", str(STEPS)]
                arguments = layout_runs.trainer_arguments(folder, layout, stage, _save(folder, name, stage))
                actual[half][layout.ranks].append([*arguments, *steps, *stop])
    return actual


def rows(folder: Path, only: str) -> list[dict]:
    """How far each pair is from the uninterrupted run."""
    return [
        {"pair": name, "stage": stage}
        | vars(layout_runs.difference(_save(folder, name, stage), _save(folder, "whole", stage)))
        for name in _chosen(only)
        for stage in STAGES
    ]


def _chosen(only: str) -> list[str]:
    return [name for name in PAIRS if re.search(only, name)]


def _save(folder: Path, name: str, stage: str) -> Path:
    number = f"pair-{[*PAIRS].index(name)}" if name in PAIRS else name
    return folder / "resumed" / f"{number}-{stage}"


if __name__ == "__main__":
    layout_runs.measure_and_report(__doc__, "pairs", 2 * STEPS, measure)
