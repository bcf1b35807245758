"""What launch/stage1.sh adds to torchrun before the trainer starts; the limit is 0.2 s.

    python -m benchmarks.launcher [--rounds 21] [--nproc-per-node 1] [--output launcher.json]

Starts the launcher and plain torchrun (the baseline) in turns, with the same Python and the same arguments, and
measures the time until the last rank's Python runs (which then ends at once: the start of the trainer is not included).
Prints medians as JSON, and differences in CPU time too, which other processes on the machine disturb less.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT, add_json, argument_parser, environment, working_folder, write_json
from benchmarks.timing import Times, median_s, take_turns

LIMIT_S = 0.2
# Python imports a module of this name before any other: a rank writes down the time and ends.
SITECUSTOMIZE = """
import os, time
if "LOCAL_RANK" in os.environ:
    with open(os.environ["STARTED"], "a") as file:
        file.write(f"{time.time()}\\n")
    os._exit(0)
"""


def main() -> None:
    parser = argument_parser(__doc__, rounds=21)
    parser.add_argument("--nproc-per-node", type=int, default=1, help="number of ranks")
    add_json(parser, "--output")
    args = parser.parse_args()
    ranks = ["--nproc-per-node", str(args.nproc_per_node)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks]
    commands = {
        "launcher": [str(ROOT / "launch" / "stage1.sh"), *ranks],
        "torchrun": [*torchrun, "-m", "moelpr.pretrain", "--stage", "stage1"],
    }
    with working_folder(None) as folder:
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        wall, cpu = take_turns(commands, args.rounds, lambda command: until_ranks_start(command, folder))
    medians, difference = median_s(wall), difference_s(wall)
    result = {
        **{f"{name}_s": round(seconds, 3) for name, seconds in medians.items()},
        "ratio": round(medians["launcher"] / medians["torchrun"], 3),
        "difference_s": difference,
        "wanted_difference_s": LIMIT_S,
        "is_kept": difference <= LIMIT_S,
        "cpu_difference_s": difference_s(cpu),
        "rounds": args.rounds,
        "nproc_per_node": args.nproc_per_node,
    }
    print(json.dumps(result, indent=2))
    write_json(result, args.output)


def difference_s(times: Times) -> float:
    """Median over rounds of the launcher's time minus torchrun's in the same round, in seconds."""
    pairs = zip(times["launcher"], times["torchrun"], strict=True)
    return round(statistics.median(launcher - torchrun for launcher, torchrun in pairs), 3)


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


if __name__ == "__main__":
    main()
