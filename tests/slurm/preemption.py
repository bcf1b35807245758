"""Does a preemption at a random step change a run? Every trial must be bitwise identical to the uninterrupted run.

    python -m tests.slurm.preemption --trials 10 --output preemption.json

Starts a throw-away Slurm of two nodes (tests/slurm/cluster.py) and trains a tiny model there, once without interruption
and then once per trial, in which a job of a higher-priority partition takes the nodes away at a random step. Half of
the trials are asked to stop as Slurm does by default (SIGTERM to the processes), half as with
`PreemptParameters=send_user_signal` (SIGUSR1 to the job script). Losses, all other metrics, and the last checkpoint's
model and optimizer are compared; exits with code 1 if a trial differs. Requires root, and Debian's slurmctld, slurmd
and slurm-client, which `make test-slurm` installs.
"""

import json
import os
import random
import sys
import time

from benchmarks.common import ROOT, add_json, argument_parser, write_json
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from tests.slurm.cluster import missing_programs, throwaway_cluster
from tests.slurm.material import STEPS, Stage, differences

# Early enough that the run does not end before Slurm has noticed the other job.
_LAST_STEP = STEPS - 20


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--trials", type=int, default=10, help="number of preempted runs")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the steps")
    add_json(parser, "--output")
    args = parser.parse_args()
    if missing := missing_programs():
        raise UserError(f"{', '.join(missing)} not found; install slurmctld, slurmd and slurm-client")
    if os.getuid() != 0:
        raise UserError("a throw-away Slurm requires root; run this as root, for example in a container")
    os.chdir(ROOT)
    steps = random.Random(args.seed)
    trials = []
    for sends_usr1, count in ((False, args.trials - args.trials // 2), (True, args.trials // 2)):
        with throwaway_cluster(preempt_by_user_signal=sends_usr1) as cluster:
            stage = Stage(cluster, cluster.folder.parent)
            job = stage.submit("unbroken")
            if count and cluster.wait(job, timeout_s=300) != "COMPLETED":
                raise UserError(f"the uninterrupted run failed:\n{stage.log('unbroken')[-2000:]}")
            for number in range(count):
                trials.append(run_trial(stage, f"trial{number}", steps.randint(1, _LAST_STEP), sends_usr1))
                print(json.dumps(trials[-1]), file=sys.stderr, flush=True)
    result = {
        "trials": len(trials),
        "steps": STEPS,
        "equal_bit_for_bit": sum(not trial["differences"] for trial in trials),
        "steps_lost": sum(trial["steps_lost"] for trial in trials),
        "each": trials,
    }
    write_json(result, args.output)
    if not args.output:
        print(json.dumps(result, indent=2))
    sys.exit(0 if result["equal_bit_for_bit"] == len(trials) else 1)


def run_trial(stage: Stage, name: str, step: int, sends_usr1: bool) -> dict:
    """Preempt one run once and compare it with the uninterrupted run."""
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
    # metrics.jsonl ends with the last step before the preemption until the run resumes.
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
