"""Does a chain on Slurm end the same, whatever happens to its jobs? Each file must be that of the undisturbed chain.

    python -m tests.slurm.interrupted_chain --chains 3 --interruptions 7 --json interrupted.json

Starts a throw-away Slurm of two nodes and runs `moelpr run languages.yaml --on slurm` of a tiny model to its end, once
undisturbed and then `--chains` times with something that happens to a running job every now and then: it is requeued,
asked to end near its time limit, preempted, canceled, or one of its processes is killed (the engine, a launcher, a rank
or another). After a job has failed, the same command submits the rest again. Corpora, losses, checkpoints, export and
evaluation are compared; exits with code 1 if a chain differs. Requires root, and
Debian's slurmctld, slurmd and slurm-client, which `make test-slurm` installs.
"""

import json
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.common import ROOT, argument_parser, write_json
from moelpr.base.command import run_command
from tests.slurm.cluster import Cluster, throwaway_cluster
from tests.slurm.material import differences
from tests.slurm.project import ProjectChain

LENGTH = {"train-iters": 30, "save-interval": 10}
WAYS = ("requeue", "time limit", "preemption", "cancel", "kill", "kill")
_EXACT = ("data/*.bin", "data/*.idx", "data/*.lang", "data/*.jsonl", "hf/*.json", "hf/*.safetensors")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--chains", type=int, default=3, help="number of disturbed chains")
    parser.add_argument("--interruptions", type=int, default=7, help="what happens to each")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args()
    os.chdir(ROOT)
    chooses = random.Random(args.seed)
    trials = []
    with throwaway_cluster() as cluster, tempfile.TemporaryDirectory(prefix="chain-") as folder:
        unbroken = ProjectChain(cluster, Path(folder, "unbroken"), **LENGTH)
        finish(unbroken, 0, chooses)
        for number in range(args.chains):
            chain = ProjectChain(cluster, Path(folder, f"chain{number}"), **LENGTH)
            happened = finish(chain, args.interruptions, chooses)
            trials.append({"happened": happened, "differences": compared(unbroken.run, chain.run)})
            print(json.dumps(trials[-1]), file=sys.stderr, flush=True)
    result = {
        "chains": len(trials),
        "interruptions": sum(len(trial["happened"]) for trial in trials),
        "equal_byte_for_byte": sum(not trial["differences"] for trial in trials),
        "each": trials,
    }
    write_json(result, args.json)
    if not args.json:
        print(json.dumps(result, indent=2))
    sys.exit(0 if result["equal_byte_for_byte"] == len(trials) else 1)


def finish(chain: ProjectChain, interruptions: int, chooses: random.Random) -> list[str]:
    """Run a chain to its end; returns what happened to it, and to which task."""
    happened: list[str] = []
    while True:
        if not (jobs := {line.split()[1].strip(","): name for name, line in chain.submit().items() if "job " in line}):
            return happened
        while active := chain.cluster("squeue", "-h", "-o", "%F %T").splitlines():
            time.sleep(chooses.uniform(1, 30) if interruptions > len(happened) else 1)
            running = [line.split()[0] for line in active if line.endswith(" RUNNING")]
            if running and len(happened) < interruptions:
                job, way = chooses.choice(running), chooses.choice(WAYS)
                if what := _interrupt(chain.cluster, job, way, chooses):
                    happened.append(f"{what}: {jobs.get(job, job)}")


def _interrupt(cluster: Cluster, job: str, way: str, chooses: random.Random) -> str:
    """Let something happen to a running job; returns what, "" if the job has ended before."""
    if way == "requeue":
        cluster("scontrol", "requeue", job, check=False)
    elif way == "time limit":
        cluster("scancel", "--batch", "--signal", "USR1", job, check=False)
    elif way == "preemption":
        cluster.preempt()
    elif way == "cancel":
        cluster("scancel", job, check=False)
    else:
        if not (own := cluster.processes(job)):
            return ""
        killed = chooses.choice(own)
        way = f"kill {' '.join(killed.cmdline()[:4])}"
        with suppress(psutil.Error):
            killed.kill()
    return way


def compared(one: Path, other: Path) -> list[str]:
    """List the differences between the outputs of two chains."""
    actual = [f"{stage}: {what}" for stage in ("stage1", "stage2") for what in differences(one / stage, other / stage)]
    files = {str(path.relative_to(one)) for pattern in _EXACT for path in one.glob(pattern)}
    for name in sorted(files):
        if not (other / name).exists() or (one / name).read_bytes() != (other / name).read_bytes():
            actual.append(name)
    measured = [json.loads((run / "evaluation/results.json").read_text())["models"] for run in (one, other)]
    return actual if measured[0] == measured[1] else [*actual, "evaluation/results.json"]


if __name__ == "__main__":
    run_command(main)
