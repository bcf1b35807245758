"""What launch/stage1.sh adds to torchrun before the trainer starts; wanted: at most 0.2 s.

    python benchmarks/launcher.py [--rounds 21] [--nproc-per-node 2] [--output launcher.json]

Starts the launcher and plain torchrun in turns, with the same Python and the same words, and takes the time until the
last rank's Python runs (which then ends at once: the trainer's own start is no part of it). Medians, on stdout as JSON;
the CPU's time beside them, which other processes on the machine disturb less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WANTED_S = 0.2
# Python imports a module of this name first of all: a rank notes the time and ends.
AT_START = """
import os, time
if "LOCAL_RANK" in os.environ:
    with open(os.environ["STARTED"], "a") as file:
        file.write(f"{time.time()}\\n")
    os._exit(0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="default: %(default)s")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    ranks = ["--nproc-per-node", str(args.nproc_per_node)]
    commands = {
        "launcher": [str(ROOT / "launch" / "stage1.sh"), *ranks],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks, "-m", "moelpr.pretrain",
                     "--stage", "stage1"],
    }  # fmt: skip
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(AT_START)
        for place in range(-1, args.rounds):  # the first round warms the disk cache
            for name in sorted(commands, reverse=place % 2 == 0):
                wall_s, cpu_s = until_the_ranks_start(commands[name], Path(folder))
                if place >= 0:
                    wall[name].append(wall_s)
                    cpu[name].append(cpu_s)
    difference = difference_of(wall)
    result = {
        "launcher_s": round(statistics.median(wall["launcher"]), 3),
        "torchrun_s": round(statistics.median(wall["torchrun"]), 3),
        "ratio": round(statistics.median(wall["launcher"]) / statistics.median(wall["torchrun"]), 3),
        "difference_s": difference,
        "wanted_difference_s": WANTED_S,
        "is_kept": difference <= WANTED_S,
        "cpu_difference_s": difference_of(cpu),
        "rounds": args.rounds,
        "nproc_per_node": args.nproc_per_node,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def difference_of(taken: dict[str, list[float]]) -> float:
    """Median over rounds of what the launcher took more than torchrun in the same round."""
    pairs = zip(taken["launcher"], taken["torchrun"], strict=True)
    return round(statistics.median(one - other for one, other in pairs), 3)


def until_the_ranks_start(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds from the command to the last rank's first line of Python, and the CPU's seconds until all has ended."""
    started = folder / "started"
    started.unlink(missing_ok=True)
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "STARTED": str(started), "OMP_NUM_THREADS": "1"}
    before, start = os.times(), time.time()
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return max(map(float, started.read_text().split())) - start, cpu_s


if __name__ == "__main__":
    main()
