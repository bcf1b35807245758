"""The commands that the Slurm scripts run, recorded by stubs; tests/slurm uses a real Slurm."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = 'printf "%s" "${0##*/}" >>"$CALLS"; printf " [%s]" "$@" >>"$CALLS"; echo >>"$CALLS"\n'
PROGRAMS = {
    "sbatch": RECORD + 'wc -l <"$CALLS"',
    "squeue": 'for word in "$@"; do [[ " ${IN_QUEUE:-} " == *" $word "* ]] && echo "$word"; done; true',
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
        (folder / "bin").mkdir()
        for name, body in PROGRAMS.items():
            program = folder / "bin" / name
            program.write_text(f"#!/usr/bin/env bash\n{body}\n")
            program.chmod(0o755)

    def __call__(self, *arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        environment = {**os.environ, **slurm, "CALLS": str(self._file), **variables}
        environment["PATH"] = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        command = ["bash", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=20)

    @property
    def made(self) -> list[str]:
        return self._file.read_text().splitlines()


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


def chain(run: Path) -> list[object]:
    return [
        *("launch/slurm/submit.sh", "--run", run, "--account", "lab", "--apptainer", "image.sif"),
        *("@expanded", "--shards", "2", "--partition", "cpu", "--", "--input", "a b.jsonl"),
        *("@replay", "--", "--input", "r.jsonl"),
        *("@convert", "--", "--hf-path", "hf", "--num-new-experts", "5"),
        *("@stage1", "--nodes", "4", "--", "--recipe", "r1.yaml"),
        *("@stage2", "--", "--recipe", "r2.yaml", "--train-iters", "500"),
        *("@export", "@evaluate", "--", "--model", "base=hf", "--data", "en=e.jsonl"),
    ]


def test_a_chain_is_submitted_with_common_options_and_those_of_each_step(calls: Calls, tmp_path: Path) -> None:
    run = tmp_path / "greek"
    done = calls(*chain(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "expanded-shards: job 1",
        "expanded: job 2, after 1",
        "replay: job 3",
        "convert: job 4",
        "stage1: job 5, after 4:2",
        "stage2: job 6, after 5:3",
        "export: job 7, after 6",
        "evaluate: job 8, after 7",
    ]
    assert all(f"[--output] [{run}/slurm/%x-%j.log] [--kill-on-invalid-dep=yes]" in call for call in calls.made)
    assert all("[--account] [lab]" in call and "[--apptainer] [image.sif]" in call for call in calls.made)
    array, merge = calls.made[:2]
    assert "[--partition] [cpu] [--array] [0,1] [launch/slurm/tool.sbatch]" in array
    assert f"[--input] [a b.jsonl] [--resume] [--output-prefix] [{run}/data/expanded] [--num-shards] [2]" in array
    assert f"[--output-prefix] [{run}/data/expanded_text_document] [--num-shards] [2] [--remove-input]" in merge
    stage2 = calls.made[5]
    assert "[--job-name] [greek-stage2]" in stage2
    assert "[--dependency] [afterok:5:3]" in stage2
    assert stage2.endswith(
        f"[stage2] [--save] [{run}/stage2] [--pretrained-checkpoint] [{run}/stage1] "
        f"[--data-path] [{run}/data/replay_text_document] [--recipe] [r2.yaml] [--train-iters] [500]"
    )
    assert "[--nodes] [4]" in calls.made[4]
    assert "[--nodes]" not in stage2
    # Changes are relative to the first model.
    assert calls.made[7].endswith(f"[--model] [base=hf] [--data] [en=e.jsonl] [--model] [stage2={run}/hf]")


def test_a_second_call_submits_only_steps_that_are_neither_done_nor_active(calls: Calls, tmp_path: Path) -> None:
    run = tmp_path / "greek"
    assert calls(*chain(run)).returncode == 0
    for name in ("data/replay_text_document.idx", "data/expanded_text_document.shard-00001-of-00002.idx"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    again = calls(*chain(run), IN_QUEUE="4")
    assert again.stdout.splitlines() == [
        "expanded-shards: job 9",
        "expanded: job 10, after 9",
        "replay: done",
        "convert: job 4 is pending or running",
        "stage1: job 11, after 4:10",
        "stage2: job 12, after 11",
        "export: job 13, after 12",
        "evaluate: job 14, after 13",
    ]
    assert "[--array] [0] [" in calls.made[8]
    busy = calls(*chain(run), IN_QUEUE="9")
    assert busy.returncode == 2
    assert "scancel 9" in busy.stderr


OUTPUTS = {
    **{step: f"data/{step}_text_document.idx" for step in ("expanded", "replay")},
    "convert": "upcycled/latest_checkpointed_iteration.txt",
    **{stage: f"{stage}/FINISHED" for stage in ("stage1", "stage2")},
    "export": "hf/config.json",
    "evaluate": "evaluation/results.json",
}


@pytest.fixture
def finished(calls: Calls, tmp_path: Path) -> list[object]:
    """A chain of which all steps are done; its stages have recipes of their own."""
    run = tmp_path / "greek"
    (tmp_path / "r1.yaml").write_text("1")
    words = [str(tmp_path / word) if word in ("r1.yaml", "r2.yaml") else word for word in chain(run)]
    assert calls(*words).returncode == 0
    for path in (*OUTPUTS.values(), *(f"stage{x}/latest_checkpointed_iteration.txt" for x in (1, 2))):
        (run / path).parent.mkdir(exist_ok=True, parents=True)
        (run / path).touch()
    assert calls(*words).stdout.splitlines() == [f"{step}: done" for step in OUTPUTS]
    return words


def test_what_was_made_from_a_step_that_is_made_again_is_made_again(calls, tmp_path, finished) -> None:
    run = tmp_path / "greek"
    num_calls = len(calls.made)
    (run / "stage1" / "FINISHED").unlink()  # as for training on from an earlier step
    stale = calls(*finished)
    assert stale.returncode == 2 and len(calls.made) == num_calls
    assert f"(stage1 is made again); remove {run}/stage2 to make it again, or " in stale.stderr
    shutil.rmtree(run / "stage2")
    assert calls(*finished).stdout.splitlines() == [
        *(f"{step}: done" for step in ("expanded", "replay", "convert")),
        "stage1: job 9",
        "stage2: job 10, after 9",
        "export is not what it would be now (stage2 is made again)",
        "export: job 11, after 10",
        "evaluate is not what it would be now (export is made again)",
        "evaluate: job 12, after 11",
    ]
    assert calls.made[10].endswith("[--overwrite]")


def test_a_step_is_not_done_if_another_call_has_made_its_source_again(calls, tmp_path, finished) -> None:
    run = tmp_path / "greek"
    shutil.rmtree(run / "stage1")
    until_stage1, rest = finished[: finished.index("@stage2")], finished[finished.index("@stage2") :]
    assert calls(*until_stage1).stdout.splitlines()[-1] == "stage1: job 9"
    running = calls(*finished, IN_QUEUE="9 6")
    assert "job 6 of @stage2 is pending or running, but stage1 has been made again since, by job 9" in running.stderr
    (run / "stage1").mkdir()
    (run / OUTPUTS["stage1"]).touch()
    stale = calls(*finished)
    assert f"(stage1 has been made again since, by job 9); remove {run}/stage2" in stale.stderr
    only_export = calls(*finished[:7], *rest[rest.index("@export") :])
    assert only_export.stdout.splitlines() == [
        "export: done",
        "evaluate: done",
    ]  # they were made from the stage 2 that is there
    (run / "slurm" / "stage2.made_from").unlink()  # keep it
    assert calls(*finished).stdout.splitlines() == [f"{step}: done" for step in OUTPUTS]


def test_a_finished_stage_is_bound_to_its_recipe(calls: Calls, tmp_path: Path, finished: list[object]) -> None:
    (tmp_path / "r1.yaml").write_text("2")
    changed = calls(*finished)
    assert changed.returncode == 2 and "(its recipe has changed); remove" in changed.stderr
    (tmp_path / "greek" / "stage1" / "FINISHED").unlink()  # settings of an unfinished one may change
    shutil.rmtree(tmp_path / "greek" / "stage2")
    assert "stage1: job 9" in calls(*finished).stdout.splitlines()


def test_stage_1_starts_from_stage_0_if_the_chain_has_one(calls: Calls, tmp_path: Path) -> None:
    run = tmp_path / "greek"
    words = chain(run)
    before = words.index("@stage1")
    assert calls(*words[:before], "@stage0", "--", "--recipe", "r0.yaml").returncode == 0
    assert "[--job-name] [greek-stage0]" in calls.made[-1]
    assert f"[--pretrained-checkpoint] [{run}/upcycled] [--data-path] [{run}/data/expanded_text" in calls.made[-1]
    forgotten = calls(*words, IN_QUEUE="2 4 5")
    assert forgotten.returncode == 2 and "@stage1 requires @stage0" in forgotten.stderr
    done = calls(*words[:before], "@stage0", *words[before:], IN_QUEUE="2 4 5")
    assert "stage1: job 8, after 5:2" in done.stdout.splitlines(), done.stdout
    assert f"[--pretrained-checkpoint] [{run}/stage0] [--data-path] [{run}/data/expanded_text" in calls.made[7]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--run DIR"]),
        (["--run", "RUN"], ["no step", "@convert"]),
        (["--run", "RUN", "@convert", "@stage3"], ["@stage3", "@expanded, @replay,"]),
        (["--run", "RUN", "@stage1"], ["@stage1", "@convert", "RUN"]),
        (["--run", "RUN", "@expanded", "--shards", "many", "--"], ["--shards", "integer", "many"]),
    ],
)
def test_a_wrong_chain_is_a_single_error(calls: Calls, tmp_path: Path, arguments: list, expected: list[str]) -> None:
    run = str(tmp_path / "run")
    done = calls("launch/slurm/submit.sh", *[argument.replace("RUN", run) for argument in arguments])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("submit.sh: error: ")
    assert all(text.replace("RUN", run) in done.stderr for text in expected), done.stderr
    assert calls.made == []


STAGE = ["stage1", "--save", "SAVE", "--lr", "1"]


def stage(calls: Calls, tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    save = tmp_path / "save"
    save.mkdir(exist_ok=True)
    (save / "FINISHED").touch()
    return calls(
        "launch/slurm/stage.sbatch", *[argument.replace("SAVE", str(save)) for argument in arguments], **variables
    )


def test_a_stage_runs_the_launcher_once_per_node_and_skips_an_occupied_port(calls: Calls, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = stage(calls, tmp_path, *STAGE, MASTER_PORT=str(port), SLURM_RESTART_COUNT="2")
    assert done.returncode == 0, done.stderr
    made = "\n".join(calls.made)
    assert made.startswith("srun [--export=ALL] [--kill-on-bad-exit=1] [--cpu-bind=none] [bash] [-c] [trap")
    assert f"[.] [./launch/stage1.sh] [--save] [{tmp_path}/save] [--lr] [1]" in made
    assert "NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}" in made
    assert "JOIN_TIMEOUT=300" in made
    found = re.search(r"2 nodes at 127\.0\.0\.1:(\d+) for 7-2", made)
    assert found
    assert int(found[1]) > port


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--container-image", "nv/pt:1", "--container-mounts", "/data:/data"],
            "[--container-image=nv/pt:1] [--container-mounts=HERE:HERE,/data:/data] [--container-workdir=HERE] [bash]",
        ),
        (
            ["--apptainer", "pt.sif"],
            "[--cpu-bind=none] [apptainer] [exec] [--nv] [--bind] [HERE:HERE] [--pwd] [HERE] [pt.sif] [bash] [-c]",
        ),
    ],
)
def test_in_a_container_the_images_code_is_run(calls: Calls, tmp_path: Path, flags: list, expected: str) -> None:
    assert stage(calls, tmp_path, *flags, *STAGE).returncode == 0
    made = "\n".join(calls.made)
    assert expected.replace("HERE", str(ROOT)) in made
    assert "[/opt/moelpr] [/opt/moelpr/launch/stage1.sh] [--save]" in made
    assert "JOIN_TIMEOUT=900" in made


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["stage3"], {}, ["stage0, stage1, stage2 or dense", "'stage3'"]),
        (["stage1", "--lr", "1"], {}, ["--save DIR"]),
        (["--apptainer"], {}, ["--apptainer"]),
        (["--container-mounts", "a:b", *STAGE], {}, ["--container-mounts", "--container-image or --apptainer"]),
        (STAGE, {"SLURM_NTASKS": "16"}, ["--ntasks-per-node 1", "16 tasks on 2 nodes"]),
        (STAGE, {"SLURM_CPUS_ON_NODE": "7", "SLURM_GPUS_ON_NODE": "8"}, ["7 CPUs for 8 GPUs", "--cpus-per-gpu"]),
    ],
)
def test_a_stage_that_cannot_run_is_a_single_error(calls, tmp_path, arguments, variables, expected) -> None:
    done = stage(calls, tmp_path, *arguments, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("job: error: ") and all(text in done.stderr for text in expected), done.stderr
    assert calls.made == []


@pytest.mark.parametrize("arguments", [["--save", "SAVE"], ["--save=SAVE"]])
def test_the_save_folder_is_found_as_argparse_finds_it(calls: Calls, tmp_path: Path, arguments: list[str]) -> None:
    """The trainer has not finished (there is no FINISHED) and was not asked to stop, so the job must fail."""
    empty = str(tmp_path / "empty")
    done = calls("launch/slurm/stage.sbatch", "stage1", *[argument.replace("SAVE", empty) for argument in arguments])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("job: stopped manually")


def test_a_stage_exits_with_the_trainers_code_and_is_not_repeated(calls: Calls, tmp_path: Path) -> None:
    assert stage(calls, tmp_path, *STAGE, SRUN_CODE="2").returncode == 2
    assert calls.made[-1] == "scontrol [update] [JobId=7] [Requeue=0]"
    num_calls = len(calls.made)
    assert stage(calls, tmp_path, *STAGE, SRUN_CODE="2", PREEMPTED="2026-01-01T00:00:00").returncode == 2
    assert stage(calls, tmp_path, *STAGE, SRUN_CODE="2", STATE="PENDING").returncode == 2
    # It may have failed because nodes were taken, or died.
    assert not any("Requeue=0" in call for call in calls.made[num_calls:])


@pytest.mark.parametrize(
    "variables, is_requeued",
    [
        ({"SRUN_CODE": "1", "SAVED": "SAVE"}, True),
        ({"SRUN_CODE": "1"}, False),
        ({"SRUN_CODE": "2", "SAVED": "SAVE"}, False),
        ({"SRUN_CODE": "1", "SAVED": "SAVE", "SLURM_RESTART_COUNT": "9"}, True),  # after time limits and preemptions
        ({"SRUN_CODE": "1", "SAVED": "SAVE", "STATE": "PENDING"}, False),
    ],
)
def test_a_stage_that_fails_after_it_has_saved_a_step_is_tried_again(calls, tmp_path, variables, is_requeued) -> None:
    """A GPU or a link may have failed in the middle of the night."""
    save = tmp_path / "run"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("10\n")
    variables = {name: value.replace("SAVE", str(save)) for name, value in variables.items()}
    done = calls("launch/slurm/stage.sbatch", "stage1", "--save", save, **variables)
    assert done.returncode == int(variables["SRUN_CODE"])
    assert ("scontrol [requeue] [7]" in calls.made) == is_requeued
    assert ("failed after saving step 20" in done.stdout) == is_requeued
    assert ("scontrol [update] [JobId=7] [Requeue=0]" in calls.made) == (not is_requeued and "STATE" not in variables)


def test_a_stage_that_fails_five_times_in_a_row_is_given_up(calls: Calls, tmp_path: Path) -> None:
    save = tmp_path / "run"
    save.mkdir()

    def start(**variables: str) -> str:
        (save / "latest_checkpointed_iteration.txt").write_text("10\n")
        calls("launch/slurm/stage.sbatch", "stage1", "--save", save, SAVED=str(save), **variables)
        return calls.made[-1]

    fails = {"SRUN_CODE": "1"}
    assert {start(**fails) for _ in range(4)} == {"scontrol [requeue] [7]"}
    start(PREEMPTED="2026-01-01T00:00:00")  # a clean stop
    assert {start(**fails) for _ in range(4)} == {"scontrol [requeue] [7]"}
    assert start(**fails) == "scontrol [update] [JobId=7] [Requeue=0]"
    assert start(**fails, SLURM_JOB_ID="8") == "scontrol [requeue] [8]"  # submitted again, without the broken node


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
    done = calls(
        "launch/slurm/stage.sbatch", "stage1", "--save", tmp_path, PREEMPTED="2026-01-01T00:00:00", **variables
    )
    assert done.returncode == 0 and "preempted" in done.stdout
    assert ("scontrol [requeue] [7]" in calls.made) == is_requeued_here


@pytest.mark.parametrize(
    "mounts", ["{here}:/data,/elsewhere:/data2", "/elsewhere:/data,{here}/save:/data/save/", "{here}"]
)
def test_a_stage_finds_its_folder_outside_the_container(calls: Calls, tmp_path: Path, mounts: str) -> None:
    save = f"{tmp_path}/save" if mounts == "{here}" else "/data/save"
    flags = ["--container-mounts", mounts.format(here=tmp_path)]
    done = stage(calls, tmp_path, "--apptainer", "a.sif", *flags, "stage1", "--save", save)
    assert done.returncode == 0, done.stderr
    assert f"[--save] [{save}]" in "\n".join(calls.made)


def test_a_stage_starts_where_nodes_are_not_shown(calls: Calls, tmp_path: Path) -> None:
    scontrol = calls.folder / "bin" / "scontrol"
    scontrol.write_text(
        scontrol.read_text().replace('*node*) echo "NodeName=n1 NodeAddr=127.0.0.1 Port=1"', "*node*) exit 1")
    )
    scontrol.write_text(scontrol.read_text().replace("echo n1", "echo localhost"))
    assert stage(calls, tmp_path, *STAGE).returncode == 0
    assert "2 nodes at localhost:" in "\n".join(calls.made)


def test_tools_of_an_array_get_their_shard(calls: Calls) -> None:
    arguments = ["launch/slurm/tool.sbatch", "data_tools/preprocess_data.py", "--num-shards", "8"]
    assert calls(*arguments, SLURM_ARRAY_TASK_ID="3").returncode == 0
    assert "[.] [-m] [data_tools.preprocess_data] [--num-shards] [8] [--shard] [3]" in "\n".join(calls.made)


@pytest.mark.parametrize(
    "tool, restarts, ending",
    [
        ("data_tools/preprocess_data.py", "0", "[--input] [el.jsonl]"),
        ("data_tools/preprocess_data.py", "1", "[--input] [el.jsonl] [--resume]"),
        ("data_tools/merge_data.py", "1", "[--input] [el.jsonl]"),
    ],
)
def test_a_requeued_preprocessing_job_resumes(calls: Calls, tool: str, restarts: str, ending: str) -> None:
    """It started again from its first document after each preemption."""
    calls("launch/slurm/tool.sbatch", tool, "--input", "el.jsonl", SLURM_RESTART_COUNT=restarts)
    assert f"{ending}\n" in "\n".join(calls.made)


@pytest.mark.parametrize("script", ["stage.sbatch", "tool.sbatch"])
def test_a_job_submitted_from_another_folder_is_rejected(calls: Calls, tmp_path: Path, script: str) -> None:
    done = calls(ROOT / "launch/slurm" / script, *STAGE, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"{script}: error: ") and "repository root" in done.stderr
