"""A stage that is interrupted on a real Slurm loses no step, gives the same result, and leaves no process."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.material import STEPS, Stage, differences


@pytest.fixture(scope="module")
def stage(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(cluster, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def unbroken(stage: Stage) -> Path:
    job = stage.submit("unbroken")
    assert stage.cluster.wait(job) == "COMPLETED", stage.log("unbroken")[-3000:]
    return stage.folder / "unbroken"


def test_a_time_limit_a_preemption_and_a_node_failure_change_no_result(stage: Stage, unbroken: Path) -> None:
    """One job, interrupted in each way once, each time after a few steps of its own."""
    cluster, name = stage.cluster, "interrupted"
    job = stage.submit(name)

    def restarts() -> int:
        return int(cluster.job(job)["Restarts"])

    # The signal that Slurm sends near the time limit.
    step = stage.until_step(name, 3)
    cluster("scancel", "--batch", "--signal", "USR1", job)
    cluster.until(lambda: restarts() == 1)
    stopped_at = stage.saved_step(name)
    assert stopped_at >= step
    assert f"moelpr: stopped after step {stopped_at} of {STEPS}" in stage.log(name)
    assert "interrupted: the time limit is near" in stage.log(name)

    # A job of a higher-priority partition requests the nodes.
    step = stage.until_step(name, stopped_at + 3)
    urgent = cluster.preempt()
    cluster.until(lambda: restarts() == 2)
    assert cluster.wait(urgent) == "COMPLETED"
    assert "interrupted: preempted" in stage.log(name)
    preempted_at = stage.saved_step(name)
    assert preempted_at >= step > stopped_at

    # A node fails: steps since the last checkpoint are repeated.
    stage.until_step(name, max(preempted_at, 25) + 2)
    cluster("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    cluster.until(lambda: restarts() == 3)
    cluster("scontrol", "update", "NodeName=n2", "State=RESUME")

    assert cluster.wait(job) == "COMPLETED", stage.log(name)[-3000:]
    assert restarts() == 3
    assert differences(unbroken, stage.folder / name) == []
    assert stage.log(name).count("moelpr: weights from") == 1  # one log contains all four starts
    assert f"moelpr: stage1 is finished, step {STEPS} of {STEPS}" in stage.log(name)
    assert not (stage.folder / name / "STOP").exists()


def test_scancel_saves_the_last_step_and_leaves_no_process(stage: Stage) -> None:
    job = stage.submit("cancelled")
    waiting = stage.submit("waiting", "--dependency", f"afterok:{job}", "--kill-on-invalid-dep", "yes")
    step = stage.until_step("cancelled", 5)
    assert len(stage.cluster.processes()) >= 4  # at least a launcher and a rank per node
    stage.cluster("scancel", job)
    stage.cluster.until(lambda: not stage.cluster.processes(), timeout_s=30)
    assert stage.cluster.wait(job) == "CANCELLED"
    assert stage.cluster.wait(waiting) == "CANCELLED"
    assert stage.saved_step("cancelled") >= step


def test_a_manually_stopped_stage_does_not_count_as_done(stage: Stage) -> None:
    job = stage.submit("by-hand")
    stage.until_step("by-hand", 5)
    (stage.folder / "by-hand" / "STOP").touch()
    assert stage.cluster.wait(job) == "FAILED"
    assert "by-hand: stopped manually" in stage.log("by-hand")
    assert stage.cluster.job(job)["Restarts"] == "0"


def test_a_node_that_is_down_at_the_start_ends_the_job_within_a_minute(stage: Stage) -> None:
    """Slurm has not noticed yet, so it allocates the node."""
    cluster = stage.cluster
    cluster.kill_node("n2")
    try:
        job = stage.submit("dead-node")
        cluster.until(lambda: cluster.state(job) not in ("PENDING", "CONFIGURING", "RUNNING"), timeout_s=60)
        assert not [process for process in cluster.processes() if "moelpr" in " ".join(process.cmdline())]
    finally:
        cluster("scancel", job)
        cluster.start_node("n2")
