"""What a preemption at a random step changes: nothing, if each trial equals the unbroken run bit for bit.

    python -m benchmarks.preemption --trials 10 --output preemption.json

Starts a throw-away Slurm of two nodes (tests/slurm/cluster.py), trains a tiny model there once unbroken, and then in
each trial until a job of a higher-priority partition takes the nodes away at a random step. Half of the trials are
asked to stop as Slurm asks by default (SIGTERM to the processes), half as with `PreemptParameters=send_user_signal`
(SIGUSR1 to the job script). Losses, all other metrics, and the last checkpoint's model and optimizer are compared.
Needs root, and Debian's slurmctld, slurmd and slurm-client, which `make test-slurm` installs.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moelpr.errors import UserError, run_command
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.material import ROOT, differences
from tests.slurm.stage import STEPS, Stage

# So early that the run is not over before Slurm has noticed the other job.
_LAST_STEP = STEPS - 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON (default: standard output)")
    args = parser.parse_args()
    if missing := missing_programs():
        raise UserError(f"{', '.join(missing)} are not here; install slurmctld, slurmd and slurm-client")
    if os.getuid() != 0:
        raise UserError("a throw-away Slurm needs root; run this as root, in a container for example")
    os.chdir(ROOT)
    steps = random.Random(args.seed)
    trials = []
    for sends_usr1, count in ((False, args.trials - args.trials // 2), (True, args.trials // 2)):
        with throwaway_stage(sends_usr1) as stage:
            job = stage.submit("unbroken")
            if count and stage.cluster.wait(job, timeout_s=300) != "COMPLETED":
                raise UserError(f"the unbroken run failed:\n{stage.log('unbroken')[-2000:]}")
            for number in range(count):
                trials.append(trial(stage, f"trial{number}", steps.randint(1, _LAST_STEP), sends_usr1))
                print(json.dumps(trials[-1]), file=sys.stderr, flush=True)
    result = {
        "trials": len(trials),
        "steps": STEPS,
        "equal_bit_for_bit": sum(not one["differences"] for one in trials),
        "steps_lost": sum(one["steps_lost"] for one in trials),
        "each": trials,
    }
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    else:
        print(text)
    sys.exit(0 if result["equal_bit_for_bit"] == len(trials) else 1)


@contextmanager
def throwaway_stage(sends_usr1: bool) -> Iterator[Stage]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with Cluster(folder / "cluster", preempt_by_user_signal=sends_usr1) as cluster:
            cluster.environment |= {"OMP_NUM_THREADS": "1"}
            yield Stage(cluster, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trial(stage: Stage, name: str, step: int, sends_usr1: bool) -> dict:
    """One run, preempted once; how it compares with the unbroken one."""
    cluster, started = stage.cluster, time.monotonic()
    job = stage.submit(name)
    stage.until_step(name, step)
    asked = time.monotonic()
    urgent = cluster.submit(
        "--partition", "high", "--nodes", 2, "--exclusive", "--output", "/dev/null", "--wrap", "true"
    )
    cluster.until(lambda: cluster.state(urgent) not in ("PENDING", "CONFIGURING"), timeout_s=90)
    free = time.monotonic()
    saved = stage.saved_step(name)
    # The last step of the first life is in metrics.jsonl, which the second one continues.
    lost = stage.until_step(name, 1) - saved
    state = cluster.wait(job, timeout_s=300)
    return {
        "asked_by": "SIGUSR1" if sends_usr1 else "SIGTERM",
        "preempted_at_step": step,
        "saved_step": saved,
        "steps_lost": lost,
        "nodes_free_after_s": round(free - asked, 1),
        "restarts": int(cluster.job(job)["Restarts"]),
        "state": state,
        "wall_s": round(time.monotonic() - started, 1),
        "differences": differences(stage.folder / "unbroken", stage.folder / name),
    }


if __name__ == "__main__":
    run_command(main)
