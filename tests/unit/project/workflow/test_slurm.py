"""A chain is submitted as jobs that wait for one another. sbatch and squeue are stubs; tests/slurm has a real Slurm."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from moelpr.base import records
from moelpr.base.errors import CONTROL, UserError
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.project.workflow.slurm import Chain, SlurmJobs, SlurmSettings
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow
from tests.support.programs import put_on_path

# sbatch numbers its calls, and refuses what $REFUSED names; the queue is a file.
STUBS = {
    "sbatch": 'if [[ "$*" == *"${REFUSED:-nothing}"* ]]; then\n'
    'printf "sbatch: a notice\\nsbatch: error: invalid partition\\n" >&2; exit 1; fi\n'
    'echo "$@" >>"$STUBS/calls"; wc -l <"$STUBS/calls"; grep -oP "(?<=job-name=).*" "${@: -1}" >>"$STUBS/names"',
    "squeue": 'cat "$STUBS/queue" 2>/dev/null; true',
}
LANGUAGES = ("el", "hu")


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return put_on_path(monkeypatch, tmp_path / "bin", STUBS)


def tasks(run: Path, rate: str = "1") -> list[Task]:
    """Text of two languages, upcycling, a training on four nodes, and its export."""

    def task(name: str, output: str, **options: object) -> Task:
        return Task(name=name, command=["moelpr", name], is_complete=(run / output).exists, **options)

    corpora = {code: (run / "data" / f"{code}_text_document",) for code in LANGUAGES}
    made_from = tuple(f"preprocess-{code}" for code in LANGUAGES)
    actual = [task(f"preprocess-{code}", f"data/{code}_text_document.idx", corpora=corpora[code]) for code in LANGUAGES]
    actual += [task("convert", "upcycled", memory_gib=16)]
    save = run / "stage1"
    train = ["moelpr", "train", "stage1", "--lr", rate]
    stage = Task(name="stage1", command=train, made_from=("convert", *made_from), continues=save, nodes=4)
    stage = replace(stage, gpus_per_node=8, is_complete=(save / "FINISHED").exists)
    return [*actual, stage, task("export", "hf", made_from=("stage1",))]


def submit(run: Path, *, render_only: bool = False, rate: str = "1", **settings: object) -> None:
    parsed = records.validate(SlurmSettings, settings, "slurm", "correct it")
    Chain(Workflow(run, tasks(run, rate)), parsed, Path("languages.yaml")).submit(render_only=render_only)


def finish(run: Path, *names: str) -> None:
    """Do what the jobs of these tasks do."""
    for task in tasks(run):
        if task.name in names:
            output = {"convert": "upcycled", "stage1": "stage1/FINISHED", "export": "hf"}.get(task.name)
            path = run / (output or f"data/{task.name[-2:]}_text_document.idx")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            (path.parent / TRACKER_FILE).touch()
            workflow = Workflow(run, tasks(run))
            workflow.logs.mkdir(exist_ok=True)
            workflow.adopt(task.name, str(next(x.id for x in workflow.outlook() if x.task.name == task.name)))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_chain_is_submitted_with_common_options_and_those_of_each_task(stubs, tmp_path, capsys) -> None:
    run = tmp_path / "runs" / "greek"
    steps = {"convert": {"partition": "big"}, "stage1": {"exclusive": False}, "preprocess": {"mem": "9G"}}
    submit(run, options={"account": "lab"}, training={"time": "24:00:00"}, steps=steps)
    assert lines(capsys)[1:4] == ["preprocess-hu: job 2", "convert: job 3", "stage1: job 4, after 3:1:2"]
    made = (stubs / "calls").read_text().splitlines()
    assert made[3] == (f"--parsable --kill-on-invalid-dep=yes --dependency=afterok:3:1:2 {run}/slurm/stage1.sbatch")
    scripts = {path.stem: path.read_text() for path in (run / "slurm").glob("*.sbatch")}
    assert all("#SBATCH --account=lab\n" in script for script in scripts.values())
    for line in ("nodes=4", "gpus-per-node=8", "ntasks-per-node=1", "mem=0", "signal=B:USR1@300", "time=24:00:00"):
        assert f"#SBATCH --{line}\n" in scripts["stage1"]
    assert "--exclusive" not in scripts["stage1"] and "--requeue\n" in scripts["stage1"]
    assert f"#SBATCH --output={run}/slurm/%x-%j.log\n" in scripts["stage1"]
    assert "#SBATCH --job-name=greek-stage1\n" in scripts["stage1"]
    assert (
        f'run_training "$(path_outside {run}/stage1)" -m moelpr run languages.yaml --task stage1\n' in scripts["stage1"]
    )
    assert "# stage1 of languages.yaml: moelpr train stage1 --lr 1\n" in scripts["stage1"]
    assert "#SBATCH --mem=9G\n" in scripts["preprocess-el"]
    assert "#SBATCH --mem=16G\n" in scripts["convert"] and "--partition=big" in scripts["convert"]
    assert "run_tool -m moelpr run languages.yaml --task convert\n" in scripts["convert"]
    for script in scripts.values():
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_second_call_submits_only_tasks_that_are_neither_done_nor_active(stubs, tmp_path, capsys) -> None:
    run = tmp_path / "greek"
    submit(run)
    finish(run, "preprocess-el")
    (stubs / "queue").write_text("3 greek-convert PENDING (Priority)\n4 another-stage1 PENDING (Priority)\n")
    lines(capsys)
    submit(run)
    expected = "done, job 6, job 3 is pending or running, job 7 after 3:6, job 8 after 7".split(", ")
    assert [line.partition(": ")[2].replace(",", "") for line in lines(capsys)] == expected
    assert SlurmJobs.read(run).jobs["stage1"].id == "7"


def test_states_tell_jobs_that_wait_from_those_that_have_ended(stubs, tmp_path) -> None:
    run = tmp_path / "greek"
    chain = Chain(Workflow(run, tasks(run)), SlurmSettings(), Path("languages.yaml"))
    assert chain.states([]) == {}
    chain.submit()
    (stubs / "queue").write_text("3 greek-convert PENDING (Priority)\n4 another-stage1 PENDING (Priority)\n")
    (log := run / "slurm" / "greek-stage1-4.log").touch()
    actual = chain.states(["preprocess-el", "preprocess-hu"])
    assert actual == {
        "convert": "job 3 PENDING (Priority)",
        "stage1": f"job 4 ended, see {log}",
        "export": "job 5 ended without a log, so it was canceled",
    }
    (stubs / "squeue").write_text("#!/bin/sh\necho down >&2; exit 1\n")
    assert chain.states([])["export"] == "job 5: squeue fails (down); try again when Slurm answers"


def test_jobs_in_the_queue_are_neither_run_here_nor_taken_for_another_command(stubs, tmp_path) -> None:
    run = tmp_path / "greek"
    chain = Chain(Workflow(run, tasks(run)), SlurmSettings(), Path("languages.yaml"))
    chain.refuse_active()
    chain.submit()
    (stubs / "queue").write_text(
        "3 greek-convert PENDING (Priority)\n4 another-stage1 PENDING (Priority)\n5 greek-export PENDING (Priority)\n"
    )
    with pytest.raises(UserError, match=r"scancel 3 5\)"):
        chain.refuse_active()
    (stubs / "queue").write_text("4 greek-stage1 PENDING (Priority)\n")
    with pytest.raises(UserError, match=r"jobs of stage1 .*scancel 4\), or wait"):
        submit(run, rate="2")
    assert len((stubs / "calls").read_text().splitlines()) == 5


def test_a_queued_job_that_does_not_wait_for_a_new_task_is_refused(stubs, tmp_path, monkeypatch) -> None:
    run = tmp_path / "greek"
    submit(run)
    names = ("preprocess-el", "preprocess-hu", "convert", "stage1", "export")
    (stubs / "queue").write_text("".join(f"{job} greek-{name} PENDING (x)\n" for job, name in enumerate(names, 1)))
    submit(run)  # all is queued
    convert, stage1, export = tasks(run)[2:]
    more = Task(name="preprocess-tr", command=["moelpr", "preprocess-tr"])
    later = replace(stage1, command=_undecided, made_from=(*stage1.made_from, more.name))
    chain = Chain(
        Workflow(run, [*tasks(run)[:2], convert, more, later, export]), SlurmSettings(), Path("languages.yaml")
    )
    with pytest.raises(UserError, match=r"jobs of stage1, export are .* wait for has changed since; .*scancel 4 5\)"):
        chain.submit()
    assert len((stubs / "calls").read_text().splitlines()) == 5


def test_queued_jobs_keep_the_options_that_they_were_submitted_with(stubs, tmp_path) -> None:
    run = tmp_path / "greek"
    submit(run, options={"time": "24:00:00"}, shards=2)
    queued = {1: "preprocess-el-shards", 2: "preprocess-el", 5: "convert"}
    (stubs / "queue").write_text("".join(f"{job} greek-{name} PENDING (Priority)\n" for job, name in queued.items()))
    submit(run, options={"time": "24:00:00"}, shards=2)
    with pytest.raises(UserError, match=r"jobs of preprocess-el, convert are .* but their options, .*scancel 1 2 5\)"):
        submit(run, options={"time": "12:00:00"}, shards=2)


def test_an_array_of_shards_is_shown_until_the_job_that_joins_them_runs(stubs, tmp_path) -> None:
    run = tmp_path / "greek"
    submit(run, shards=2)
    chain = Chain(Workflow(run, tasks(run)), SlurmSettings(), Path("languages.yaml"))

    def state(*lines: str) -> str:
        (stubs / "queue").write_text("".join(f"{line}\n" for line in lines))
        return chain.states([])["preprocess-el"]

    joins = "2 greek-preprocess-el PENDING (Dependency)"
    assert state("1 greek-preprocess-el-shards RUNNING (None)", joins) == "job 1 (shards) RUNNING"
    assert state(joins) == "job 2 PENDING (Dependency)"
    (log := run / "slurm" / "greek-preprocess-el-shards-17.log").touch()  # as the one of a shard
    assert state() == f"job 1 (shards) ended, see {log}"
    (log := run / "slurm" / "greek-preprocess-el-2.log").touch()
    assert state() == f"job 2 ended, see {log}"


def test_jobs_of_all_who_have_submitted_some_are_asked_for(stubs, tmp_path, monkeypatch) -> None:
    (stubs / "squeue").write_text('#!/bin/sh\necho "$@" >>"$STUBS/asked"\n')
    for user in ("ann", "bob"):
        monkeypatch.setattr("getpass.getuser", lambda name=user: name)
        submit(tmp_path / "greek")
    assert "--user=ann,bob " in (stubs / "asked").read_text().splitlines()[-1]


def _undecided() -> list[str]:
    raise UserError("the tokens of preprocess-tr decide it")


def test_a_removed_output_is_made_again_and_a_training_that_has_changed_is_refused(stubs, tmp_path, capsys) -> None:
    run = tmp_path / "greek"
    submit(run)
    finish(run, "preprocess-el", "preprocess-hu", "convert", "stage1")
    (run / "stage1" / "FINISHED").unlink()
    lines(capsys)
    submit(run)
    made = lines(capsys)
    assert "stage1: again, because its output was removed" in made and made[-1] == "export: job 7, after 6"
    assert made[:3] == ["preprocess-el: done", "preprocess-hu: done", "convert: done"]
    finish(run, "stage1", "export")
    submit(run)
    assert {line.split(": ")[1] for line in lines(capsys)} == {"done"}
    (run / "hf").unlink()
    with pytest.raises(UserError, match="would continue .*stage1, which was made before: its command has changed"):
        submit(run, rate="2")
    submit(run)
    assert lines(capsys)[-2:] == ["export: again, because its output was removed", "export: job 8"]


def test_a_preprocessing_task_is_an_array_and_a_job_that_joins(stubs, tmp_path, capsys) -> None:
    run = tmp_path / "greek"
    submit(run, shards=3)
    assert lines(capsys)[:2] == ["preprocess-el-shards: job 1", "preprocess-el: job 2, after 1"]
    array = (run / "slurm" / "preprocess-el-shards.sbatch").read_text()
    assert "#SBATCH --array=0,1,2\n" in array
    assert 'moelpr preprocess-el --num-shards 3 --shard "$SLURM_ARRAY_TASK_ID"\n' in array
    joins = (run / "slurm" / "preprocess-el.sbatch").read_text()
    corpus = run / "data" / "el_text_document"
    assert f"moelpr data merge --output-prefix {corpus} --num-shards 3 --remove-input --overwrite" in joins
    assert (made_as := re.search(r"--task preprocess-el --made-as (\w+)", joins))

    # A shard failed: only that runs again, unless it is another command's.
    corpus.parent.mkdir()
    for number in (0, 2):
        corpus.with_name(f"{corpus.name}.shard-0000{number}-of-00003.idx").touch()
    (stubs / "queue").write_text("1 greek-preprocess-el-shards PENDING (Priority)\n")
    with pytest.raises(UserError, match="scancel 1"):
        submit(run, shards=3)
    (stubs / "queue").unlink()
    submit(run, shards=3)
    assert "#SBATCH --array=1\n" in (run / "slurm" / "preprocess-el-shards.sbatch").read_text()
    SlurmJobs({}).write(run)
    submit(run, shards=3)
    assert "#SBATCH --array=0,1,2\n" in (run / "slurm" / "preprocess-el-shards.sbatch").read_text()
    assert not list(corpus.parent.iterdir())
    # As the last line of the joining job does.
    workflow = Workflow(run, tasks(run))
    workflow.logs.mkdir()
    with pytest.raises(UserError, match="has changed since its shards were submitted"):
        workflow.adopt("preprocess-el", made_as[1])
    corpus.with_suffix(".idx").touch()
    workflow.adopt("preprocess-el", made_as[1])
    assert workflow.outlook()[0].state == "done"


def test_scripts_can_be_read_before_anything_is_submitted(stubs, tmp_path, capsys) -> None:
    run = tmp_path / "greek"
    submit(run, render_only=True, apptainer="image.sif", container_mounts=["/data:/data"])
    assert lines(capsys)[0] == f"preprocess-el: {run}/slurm/preprocess-el.sbatch"
    assert not (stubs / "calls").exists() and not (run / "slurm" / "jobs.json").exists()
    script = (run / "slurm" / "convert.sbatch").read_text()  # in a container, the image's Python runs
    assert "read_container_options --apptainer image.sif --container-mounts /data:/data\n" in script
    assert "MOELPR_PYTHON" not in script


def test_a_flag_of_several_lines_is_no_line_of_the_script(stubs, tmp_path) -> None:
    task = Task(name="report", command=["moelpr", "report", "--title", "a\nrm -rf here"])
    Chain(Workflow(tmp_path, [task]), SlurmSettings(), Path("languages.yaml")).submit(render_only=True)
    assert not re.search("^rm", (tmp_path / "slurm" / "report.sbatch").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"options": {"--partition": "gpu"}}, "slurm.options has --partition; .* without leading dashes"),
        ({"options": {"cpus_per_task": 8}}, "options has cpus_per_task; write it as in cpus-per-task"),
        ({"options": {"gres": {"gpu": 8}}}, "expected a word, a number or true, got {'gpu': 8}"),
        ({"steps": {"convrt": {}}}, r"slurm.steps.convrt is no step; did you mean convert\?"),
        ({"training": {"requeue": False}}, "training.requeue is set by moelpr run; remove it"),
        ({"options": {"nodes": 4}}, "slurm.options.nodes is set by moelpr run; remove it"),
        ({"options": {"time": "5:00"}}, "slurm.options.time: 5:00 for stage1 is not longer than the 300 s before"),
        ({"training": {"signal": "USR1@60"}}, "training.signal must be B:USR1@SECONDS, got USR1@60"),
        ({"apptainer": "no.sif"}, "there is no image no.sif; correct the path"),
        ({"apptainer": "a.sif", "container_mounts": ["/data"]}, "container_mounts has /data; write FROM:TO"),
        ({"container_image": "a", "apptainer": "b"}, "container_image and apptainer"),
        ({"container_mounts": ["/a:/a"]}, "requires container_image or apptainer"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, settings: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        submit(tmp_path / "greek", **settings)


@pytest.mark.parametrize("value", ["p\ntouch X #", "p; touch X", "$(touch X)", "`touch X`", "'\"\\", "p\u2028x", "a b"])
@pytest.mark.parametrize("place", ["value", "option", "folder", "image"])
def test_no_setting_becomes_a_command(stubs, tmp_path, monkeypatch, value: str, place: str) -> None:
    run, settings = tmp_path / "run", {"options": {"partition": value}}
    if place == "folder":
        run, settings = tmp_path / value.replace("/", "-"), {}
    if place != "value":
        settings = {"option": {"options": {value: "1"}}, "image": {"container_image": value}}.get(place, {})
    try:
        submit(run, render_only=True, **settings)
    except UserError:
        assert place == "option" or CONTROL.search(value)
        return
    assert not (CONTROL.search(value) and place != "image")
    for name in ("srun", "bash"):  # bash is what srun starts on a node
        (stubs / name).write_text("#!/bin/sh\nexit 0\n")
        (stubs / name).chmod(0o755)
    scripts = [*run.glob("slurm/*.sbatch")]
    assert scripts
    for script in scripts:
        subprocess.run(["/bin/bash", script], cwd=tmp_path, capture_output=True, timeout=20)
        subprocess.run(["/bin/bash", "-n", script], check=True)
    assert not (tmp_path / "X").exists()


def test_what_slurm_refuses_is_said_with_the_script(stubs, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REFUSED", "stage1.sbatch")
    with pytest.raises(UserError, match=r"Slurm refuses .*stage1.sbatch \(invalid partition\)"):
        submit(tmp_path / "greek")
