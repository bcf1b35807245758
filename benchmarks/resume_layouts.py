"""A run saved under one layout goes on under another: is it the run that never stopped?

    python -m benchmarks.resume_layouts [--json FILE]

Trains STEPS of each stage under the first layout of each pair, goes on to 2 x STEPS under the second, and compares the
result with one process that trained 2 x STEPS. CPU ranks, gloo, fp32. Exit code 1 when a pair is off by more than 1e-5.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.layouts import (
    EP2,
    OPTIMIZER,
    PP2,
    STAGES,
    STEPS,
    TOLERANCE,
    TP2,
    TP2_ETP1,
    VPP2,
    Difference,
    Layout,
    difference,
    launch,
    make_material,
    trainer_arguments,
)

RESHARDABLE = f"{OPTIMIZER} --dist-ckpt-optim-fully-reshardable"

# Name -> layout before, layout now. The first rows save optimizer state by parameter, the middle ones as flat buffers
# (which only the data-parallel size may change), the last ones by parameter again.
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


def resume(folder: Path, names: list[str], stages: tuple[str, ...] = STAGES) -> None:
    """Run the named pairs, and the run that never stopped, in as few launches as there are numbers of ranks."""
    steps = ["--train-iters", str(2 * STEPS)]
    first: dict[int, list[list[str]]] = {}
    second: dict[int, list[list[str]]] = {}
    for stage in stages:
        command = trainer_arguments(folder, Layout(1, ""), stage, _whole(folder, stage))
        first.setdefault(1, []).append([*command, *steps])
        for name in names:
            before, now = PAIRS[name]
            save = _broken(folder, name, stage)
            stop = ["--exit-interval", str(STEPS)]
            first.setdefault(before.ranks, []).append([*trainer_arguments(folder, before, stage, save), *steps, *stop])
            second.setdefault(now.ranks, []).append([*trainer_arguments(folder, now, stage, save), *steps])
    shutil.rmtree(folder / "resumed", ignore_errors=True)
    for half, commands in (("first", first), ("second", second)):
        for ranks in sorted(commands):
            launch(folder, ranks, commands[ranks], f"{half}-half-{ranks}")


def compare(folder: Path, name: str, stage: str) -> Difference:
    return difference(_broken(folder, name, stage), _whole(folder, stage))


def _whole(folder: Path, stage: str) -> Path:
    return folder / "resumed" / f"whole-{stage}"


def _broken(folder: Path, name: str, stage: str) -> Path:
    return folder / "resumed" / f"pair-{list(PAIRS).index(name)}-{stage}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume_layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--folder", type=Path, help="keep models, runs and logs here (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_material(folder)
        resume(folder, list(PAIRS))
        rows = [(name, stage, compare(folder, name, stage)) for name in PAIRS for stage in STAGES]
    width = max(map(len, PAIRS))
    print(f"{'saved under -> goes on under':<{width}}  stage     losses  grad norm   weights")
    for name, stage, found in rows:
        mark = "" if found.worst <= TOLERANCE else "  <-- more than 1e-5"
        print(f"{name:<{width}}  {stage}  {found.losses:8.1e}   {found.grad_norm:8.1e}  {found.weights:8.1e}{mark}")
    if args.json:
        table = [{"pair": name, "stage": stage, **vars(found)} for name, stage, found in rows]
        args.json.write_text(json.dumps({"tolerance": TOLERANCE, "steps": 2 * STEPS, "pairs": table}, indent=1) + "\n")
    if any(found.worst > TOLERANCE for _, _, found in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
