"""The commands that the Slurm scripts run, recorded by stubs; tests/slurm uses a real Slurm."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import write_program

ROOT = Path(__file__).resolve().parents[2]
RECORD = 'printf "%s" "${0##*/}" >>"$CALLS"; printf " [%s]" "$@" >>"$CALLS"; echo >>"$CALLS"\n'
PROGRAMS = {
    "srun": RECORD + 'echo "JOIN_TIMEOUT=$JOIN_TIMEOUT" >>"$CALLS"; '
    'echo "$NNODES nodes at $MASTER_ADDR:$MASTER_PORT for $PET_RDZV_ID" >>"$CALLS"; '
    '[[ -z ${SAVED:-} ]] || echo 20 >"$SAVED/latest_checkpointed_iteration.txt"; exit "${SRUN_CODE:-0}"',
    "scontrol": 'case "$*" in *hostnames*) echo n1 ;; *node*) echo "NodeName=n1 NodeAddr=127.0.0.1 Port=1" ;; '
    '"--oneliner show job"*) echo "JobId=7 JobState=${STATE:-RUNNING} PreemptTime=${PREEMPTED:-None}" ;; '
    '--version) echo "slurm ${VERSION:-24.11.5}" ;; '
    '*partition*) echo "PartitionName=low PreemptMode=${MODE:-REQUEUE}" ;; ' + f"*) {RECORD.strip()} ;; esac",
}


class Calls:
    """Runs a script with the stubs first on PATH, and records their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "calls"
        self._file.touch()
        for name, body in PROGRAMS.items():
            write_program(folder / "bin" / name, body)

    def __call__(self, *arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        environment = {**os.environ, **slurm, "CALLS": str(self._file), **variables}
        environment["PATH"] = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        command = ["bash", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=20)

    def stage(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        return self("launch/slurm/stage.sbatch", *arguments, **variables)

    def finished(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run a stage that has finished, in the folder `save`."""
        save = self.folder / "save"
        save.mkdir(exist_ok=True)
        (save / "FINISHED").touch()
        return self.stage(*[argument.replace("SAVE", str(save)) for argument in arguments], **variables)

    @property
    def made(self) -> str:
        return self._file.read_text()


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


STAGE = ["stage1", "--save", "SAVE", "--lr", "1"]


def test_a_stage_runs_the_launcher_once_per_node_and_skips_an_occupied_port(calls: Calls, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = calls.finished(*STAGE, MASTER_PORT=str(port), SLURM_RESTART_COUNT="2")
    assert done.returncode == 0, done.stderr
    made = calls.made
    assert made.startswith("srun [--export=ALL] [--kill-on-bad-exit=1] [--cpu-bind=none] [bash] [-c] [trap")
    assert f"[.] [./launch/stage1.sh] [--save] [{tmp_path}/save] [--lr] [1]" in made and "JOIN_TIMEOUT=300" in made
    assert "NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}" in made
    actual = re.search(r"2 nodes at 127\.0\.0\.1:(\d+) for 7-2", made)
    assert actual and int(actual[1]) > port


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--container-image i", "[--container-image=i] [--container-mounts=HERE:HERE] [--container-workdir=HERE]"),
        ("--apptainer pt.sif", "[apptainer] [exec] [--nv] [--bind] [HERE:HERE] [--pwd] [HERE] [pt.sif] [bash] [-c]"),
        ("--apptainer a.sif --container-mounts /data:/data", "[--bind] [HERE:HERE,/data:/data] [--pwd] [HERE]"),
    ],
)
def test_in_a_container_the_images_code_is_run(calls: Calls, flags: str, expected: str) -> None:
    assert calls.finished(*flags.split(), *STAGE).returncode == 0
    script = "[/opt/moelpr] [/opt/moelpr/launch/stage1.sh] [--save]"
    assert all(text in calls.made for text in (expected.replace("HERE", str(ROOT)), script, "JOIN_TIMEOUT=900"))


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["stage3"], {}, ["stage0, stage1, stage2, sft, dense or ffn", "'stage3'"]),
        (["stage1", "--lr", "1"], {}, ["--save DIR"]),
        (["--apptainer"], {}, ["--apptainer"]),
        (["--container-mounts", "a:b", *STAGE], {}, ["--container-mounts", "--container-image or --apptainer"]),
        (STAGE, {"SLURM_NTASKS": "16"}, ["--ntasks-per-node 1", "16 tasks on 2 nodes"]),
        (STAGE, {"SLURM_CPUS_ON_NODE": "7", "SLURM_GPUS_ON_NODE": "8"}, ["7 CPUs for 8 GPUs", "--cpus-per-gpu"]),
    ],
)
def test_a_stage_that_cannot_run_is_a_single_error(calls: Calls, arguments, variables, expected) -> None:
    done = calls.finished(*arguments, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("job: error: ") and all(text in done.stderr for text in expected), done.stderr
    assert calls.made == ""


@pytest.mark.parametrize("arguments", ["--save {}", "--save={}"])
def test_the_save_folder_is_found_as_argparse_finds_it(calls: Calls, tmp_path: Path, arguments: str) -> None:
    """The trainer has not finished (there is no FINISHED) and was not asked to stop, so the job must fail."""
    words = ["stage1", *arguments.format(tmp_path / "empty").split()]
    done = calls.stage(*words)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    spare = calls.stage(*words, IS_SPARE="yes")  # the project needs no review
    assert (spare.returncode, spare.stderr) == (0, "")


PREEMPTED = {"PREEMPTED": "2026-01-01T00:00:00"}
PENDING = {"STATE": "PENDING"}
FAILED, SAVED = {"SRUN_CODE": "1"}, {"SAVED": "SAVE"}


@pytest.mark.parametrize(
    "variables, call",
    [
        (FAILED | SAVED, "scontrol [requeue] [7]"),
        (FAILED | SAVED | {"SLURM_RESTART_COUNT": "9"}, "scontrol [requeue] [7]"),  # after limits and preemptions
        (FAILED, "scontrol [update] [JobId=7] [Requeue=0]"),
        ({"SRUN_CODE": "2"} | SAVED, "scontrol [update] [JobId=7] [Requeue=0]"),
        (FAILED | SAVED | PENDING, ""),  # it may have failed because nodes were taken, or died
        ({"SRUN_CODE": "2"} | PENDING, ""),
        ({"SRUN_CODE": "2"} | PREEMPTED, ""),
    ],
)
def test_a_stage_that_fails_after_it_has_saved_a_step_is_tried_again(calls, tmp_path, variables, call) -> None:
    """A GPU or a link may have failed in the middle of the night."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10\n")
    variables = {name: value.replace("SAVE", str(tmp_path)) for name, value in variables.items()}
    done = calls.stage("stage1", "--save", tmp_path, **variables)
    assert done.returncode == int(variables["SRUN_CODE"])
    assert re.findall("^scontrol.*", calls.made, re.MULTILINE) == ([call] if call else [])
    assert ("step 20" in done.stdout) == ("requeue]" in call)


def test_a_stage_that_fails_five_times_in_a_row_is_given_up(calls: Calls, tmp_path: Path) -> None:
    save = tmp_path / "run"
    save.mkdir()

    def start(**variables: str) -> str:
        (save / "latest_checkpointed_iteration.txt").write_text("10\n")
        calls.stage("stage1", "--save", save, SAVED=str(save), **variables)
        return calls.made.splitlines()[-1]

    assert {start(**FAILED) for _ in range(4)} == {"scontrol [requeue] [7]"}
    start(**PREEMPTED)  # a clean stop
    assert {start(**FAILED) for _ in range(4)} == {"scontrol [requeue] [7]"}
    assert start(**FAILED) == "scontrol [update] [JobId=7] [Requeue=0]"
    assert start(**FAILED, SLURM_JOB_ID="8") == "scontrol [requeue] [8]"  # submitted again, without the broken node


@pytest.mark.parametrize(
    "variables, is_requeued_here",
    [
        ({}, False),
        ({"VERSION": "23.11.9"}, True),
        ({"VERSION": "25.05.0"}, False),
        ({"MODE": "CANCEL"}, True),
        ({"MODE": "GANG,REQUEUE"}, False),
        ({"SLURM_RESTART_COUNT": "3"}, False),
        ({"SLURM_RESTART_COUNT": "4"}, True),
    ],
)
def test_a_preempted_stage_is_requeued_once(calls, tmp_path, variables, is_requeued_here) -> None:
    """Where Slurm took its clean end for success, stage 2 started from a half-trained stage 1."""
    done = calls.stage("stage1", "--save", tmp_path, **PREEMPTED, **variables)
    assert done.returncode == 0 and "preempted" in done.stdout
    assert ("scontrol [requeue] [7]" in calls.made) == is_requeued_here


@pytest.mark.parametrize(
    "mounts", ["{here}:/data,/elsewhere:/data2", "/elsewhere:/data,{here}/save:/data/save/", "{here}"]
)
def test_a_stage_finds_its_folder_outside_the_container(calls: Calls, tmp_path: Path, mounts: str) -> None:
    save = f"{tmp_path}/save" if mounts == "{here}" else "/data/save"
    flags = ["--container-mounts", mounts.format(here=tmp_path)]
    done = calls.finished("--apptainer", "a.sif", *flags, "stage1", "--save", save)
    assert done.returncode == 0 and f"[--save] [{save}]" in calls.made, done.stderr


def test_a_stage_starts_where_nodes_are_not_shown(calls: Calls) -> None:
    scontrol = calls.folder / "bin" / "scontrol"
    shown = 'echo "NodeName=n1 NodeAddr=127.0.0.1 Port=1"'
    scontrol.write_text(scontrol.read_text().replace(shown, "exit 1").replace("echo n1", "echo localhost"))
    assert calls.finished(*STAGE).returncode == 0 and "2 nodes at localhost:" in calls.made


@pytest.mark.parametrize(
    "tool, variables, ending",
    [
        ("preprocess", {"SLURM_ARRAY_TASK_ID": "3"}, "[--num-shards] [8] [--shard] [3]"),
        ("preprocess", {"SLURM_RESTART_COUNT": "0"}, "[--num-shards] [8]"),
        ("preprocess", {"SLURM_RESTART_COUNT": "1"}, "[--num-shards] [8] [--resume]"),
        ("merge", {"SLURM_RESTART_COUNT": "1"}, "[--num-shards] [8]"),
    ],
)
def test_a_tool_gets_its_shard_of_an_array_and_a_requeued_one_resumes(calls: Calls, tool, variables, ending) -> None:
    assert calls("launch/slurm/tool.sbatch", "data", tool, "--num-shards", "8", **variables).returncode == 0
    assert f"[.] [-m] [moelpr] [data] [{tool}] {ending}\n" in calls.made


@pytest.mark.parametrize("script", ["stage.sbatch", "tool.sbatch"])
def test_a_job_submitted_from_another_folder_is_rejected(calls: Calls, tmp_path: Path, script: str) -> None:
    done = calls(ROOT / "launch/slurm" / script, *STAGE, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"{script}: error: ") and "repository root" in done.stderr
