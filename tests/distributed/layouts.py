"""Do all layouts train the same model from one checkpoint?

    python -m tests.distributed.layouts [--only REGEX] [--json FILE]

Trains stages for a few steps under every layout of layout_runs.py, on CPU ranks with gloo in fp32, and compares losses,
gradient norms and updated weights with those of one process. Stages 1 and 2 train with both losses, so that every
layout is tested with every loss. Exits with code 1 if a layout is off by more than 1e-5.
"""

import re
from pathlib import Path

from tests.distributed.layout_runs import LAYOUTS, STEPS, compare, measure_and_report, run_layouts


def measure(folder: Path, only: str) -> list[dict]:
    chosen = [name for name in LAYOUTS if re.search(only, name)]
    run_layouts(folder, list(dict.fromkeys([*(LAYOUTS[name].reference for name in chosen), *chosen])))
    return [
        {"layout": name, "ranks": LAYOUTS[name].ranks, "flags": LAYOUTS[name].flags, "stage": stage}
        | vars(compare(folder, name, stage))
        for name in chosen
        for stage in LAYOUTS[name].stages
    ]


if __name__ == "__main__":
    measure_and_report(__doc__, "layouts", STEPS, measure)
