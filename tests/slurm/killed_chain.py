"""Kill processes of a project's jobs on Slurm at random moments, and compare the result with an unbroken run's.

    python -m tests.slurm.killed_chain --kills 20

Starts a throw-away Slurm of two nodes (tests/slurm/cluster.py). While a chain of jobs runs, a random process of one is
killed, or a running job canceled; when no job is left, the chain is submitted again, until all is done. Exported model,
corpora and evaluation must be the same bytes. Requires what `python -m tests.slurm.preemption` requires.
"""

import argparse
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.functional.killed_project import results
from tests.slurm.cluster import Cluster, throwaway_cluster
from tests.slurm.project import TASKS, ProjectChain

_MOST_SUBMISSIONS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments and targets (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chains-") as name, throwaway_cluster() as cluster:
        unbroken = ProjectChain(cluster, make_folder(Path(name) / "unbroken"))
        states = unbroken.wait(unbroken.submit())
        if {*states.values()} != {"COMPLETED"}:
            raise SystemExit(f"the unbroken chain failed: {states}")
        expected = results(unbroken.folder, "run")
        kills = number = 0
        while kills < args.kills:
            chain = ProjectChain(cluster, make_folder(Path(name) / f"killed-{number}"))
            made = run_killed(chain, random.Random(f"{args.seed} {number}"), args.kills - kills)
            found = results(chain.folder, "run")
            different = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
            print(f"run {number}: {made} kills, {len(different)} of {len(expected)} files differ {different[:3]}")
            if different:
                sys.exit(1)
            kills, number = kills + made, number + 1
    print(f"{kills} kills in {number} runs: every result has the bytes of an unbroken run")


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def run_killed(chain: ProjectChain, draw: random.Random, most: int) -> int:
    """Submit a chain until all is done, with at most so many kills; returns their number."""
    kills = 0
    for _ in range(_MOST_SUBMISSIONS):
        output = chain.submit()
        if {*output.values()} == {"done"} and {*output} >= {*TASKS}:
            return kills
        while chain.cluster("squeue", "-h", "-o", "%i"):
            time.sleep(draw.uniform(1, 12))
            if kills < most:
                kills += kill(chain.cluster, draw)
    raise SystemExit(f"not done after {_MOST_SUBMISSIONS} submissions: {output}")


def kill(cluster: Cluster, draw: random.Random) -> int:
    """Kill a process of a job, or cancel a running job; returns 1, or 0 if there is none."""
    if draw.random() < 0.3:
        running = cluster("squeue", "-h", "-t", "R", "-o", "%i").split()
        if running:
            cluster("scancel", draw.choice(running), check=False)
        return int(bool(running))
    # Slurm's own daemons, which have the environment of jobs too, are the machine.
    below = [process for process in cluster.processes() if "slurmstepd" not in _name(process)]
    with suppress(psutil.NoSuchProcess, IndexError):
        draw.choice(below).kill()
        return 1
    return 0


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join([process.name(), *process.cmdline()[:1]])
    return ""


if __name__ == "__main__":
    main()
