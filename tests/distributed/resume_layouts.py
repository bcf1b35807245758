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
from tests.distributed.layout_runs import (
    EP2,
    OPTIMIZER,
    PP2,
    STAGES,
    STEPS,
    TP2,
    TP2_ETP1,
    VPP2,
    Layout,
    trainer_arguments,
)

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
    runs = folder / "resumed"
    shutil.rmtree(runs, ignore_errors=True)
    halves: tuple[dict[int, list], dict[int, list]] = (defaultdict(list), defaultdict(list))
    saves: dict[tuple[str, str], Path] = {}
    for stage in STAGES:
        steps = ["--train-iters", str(2 * STEPS)]
        uninterrupted = trainer_arguments(folder, Layout(1, ""), stage, runs / f"whole-{stage}")
        halves[0][1].append([*uninterrupted, *steps])
        for number, name in enumerate(PAIRS):
            if re.search(only, name):
                saves[name, stage] = runs / f"pair-{number}-{stage}"
                for half, layout in enumerate(PAIRS[name]):
                    stop = [] if half else ["--exit-interval", str(STEPS)]
                    arguments = trainer_arguments(folder, layout, stage, saves[name, stage])
                    halves[half][layout.ranks].append([*arguments, *steps, *stop])
    for half, commands in enumerate(halves):
        for ranks in sorted(commands):
            layout_runs.launch(folder, ranks, commands[ranks], f"half-{half}-{ranks}")
    return [
        {"pair": name, "stage": stage, **vars(layout_runs.difference(save, runs / f"whole-{stage}"))}
        for (name, stage), save in sorted(saves.items(), key=lambda item: list(PAIRS).index(item[0][0]))
    ]


if __name__ == "__main__":
    layout_runs.measure_and_report(__doc__, "pairs", 2 * STEPS, measure)
