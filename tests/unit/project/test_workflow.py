"""Tasks are done once, and again when what they read has changed; failures leave out what depends on them."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from moelpr.base.command import STOPPED
from moelpr.base.errors import MachineError, StoppedError, UserError
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.project.workflow.mark import difference, fingerprint
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow


def count(path: Path, code: int = 0) -> list[str]:
    """A command that counts in a file how often it has run."""
    return ["-c", f"import sys; open({str(path)!r}, 'a').write('x'); sys.exit({code})"]


def test_a_task_runs_until_it_has_succeeded_and_again_if_its_command_changes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def run(code: int) -> None:
        Workflow(tmp_path, [Task(name="s", command=count(runs, code))]).run()

    with pytest.raises(UserError, match="task s exited with code 2"):
        run(2)
    run(0)
    run(0)
    assert runs.read_text() == "xx"
    with pytest.raises(MachineError, match="task s exited with code 1"):
        run(1)
    run(0)  # the failed command may have removed what the command before has written
    assert runs.read_text() == "xxxx"
    assert [*Workflow(tmp_path, [Task(name="s", command=[])]).wall_times_s()] == ["s"]


def test_a_task_has_its_environment_settings_and_a_log(tmp_path: Path) -> None:
    command = ["-c", "import os, sys; print(os.environ['WORD'], *sys.argv[1:])", "x"]
    for setting in ("1", "2"):  # no reason to do it again
        task = Task(name="s", command=command, environment={"WORD": "here"}, settings=["--layout", setting])
        Workflow(tmp_path, [task]).run()
    assert (tmp_path / "logs" / "s.log").read_text().splitlines()[1:] == ["here x --layout 1"]  # after the command


Chain = Callable[..., dict[str, int]]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Runs a training, an evaluation of it, and another task; returns how often each has run."""
    recipe = tmp_path / "recipe"

    def task(name: str, *made_from: str, word: str = "") -> Task:
        path = tmp_path / name
        files, continues = ((recipe,), path) if name == "train" else ((), None)
        task = Task(name=name, command=[*count(path), word], made_from=made_from, files=files)
        return replace(task, is_complete=path.is_file, continues=continues)

    def go(rate: str = "1", base: str = "1", text: str = "1") -> dict[str, int]:
        recipe.write_text(text)
        tasks = [
            task("base", word=base),
            task("train", "base", word=rate),
            task("evaluate", "train"),
            task("page", "base"),
        ]
        Workflow(tmp_path, tasks).run()
        return {x.name: len(path.read_text()) for x in tasks if (path := tmp_path / x.name).is_file()}

    return go


def test_what_reads_another_output_than_before_is_done_again(tmp_path, chain, capsys) -> None:
    assert chain() == chain() == {"base": 1, "train": 1, "evaluate": 1, "page": 1}
    (tmp_path / "logs" / "base.json").unlink()
    assert chain() == {"base": 2, "train": 1, "evaluate": 1, "page": 1}  # by the same command it is the same
    for change, reason in (
        ({"rate": "2"}, "its command has changed"),
        ({"base": "2"}, "base was made again"),
        ({"text": "2"}, f"{tmp_path}/recipe has changed"),
    ):
        with pytest.raises(UserError, match=f"continue {tmp_path}/train, which was made before: {reason}; remove it"):
            chain(**change)
        (tmp_path / "train").unlink()
        capsys.readouterr()
        chain(**change)
        assert f"train: again, because {reason}" in capsys.readouterr().out
        chain_of_before = chain(**change)
        (tmp_path / "train").unlink()
        assert chain() and chain_of_before["train"] == 1
    assert (tmp_path / "evaluate").read_text() == 7 * "x"


@pytest.mark.parametrize("code", [STOPPED, 0])
def test_a_stopped_command_is_not_continued_by_another_one(tmp_path: Path, code: int) -> None:
    def run(word: str) -> None:
        path = tmp_path / "train"
        is_complete = code == STOPPED  # its output may look complete
        task = Task(name="train", command=[*count(path, code), word], is_complete=lambda: is_complete, continues=path)
        Workflow(tmp_path, [task]).run()

    for _ in range(2):
        kind = StoppedError if code == STOPPED else MachineError
        with pytest.raises(kind, match="train was stopped before its end"):
            run("1")
    assert not Workflow(tmp_path, []).is_done("train")
    with pytest.raises(UserError, match="its command has changed"):
        run("2")


def test_a_training_that_is_resumed_says_from_which_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (run := tmp_path / "run").mkdir()
    (run / TRACKER_FILE).write_text("1200")
    Workflow(tmp_path, [Task(name="train", command=["-c", "pass"], continues=run)]).run()
    assert "train: continues after step 1,200\n" in capsys.readouterr().out


def test_an_output_that_was_removed_is_restored_if_a_task_reads_it(tmp_path: Path, chain: Chain) -> None:
    chain()
    (tmp_path / "base").unlink()
    (tmp_path / "train").unlink()
    assert chain() == {"evaluate": 1, "page": 1}
    (tmp_path / "evaluate").unlink()
    assert chain() == {"base": 1, "train": 1, "evaluate": 1, "page": 1}  # nothing was made from another output
    assert chain() == {"base": 1, "train": 1, "evaluate": 1, "page": 1}


OLD = '{"command": "-c \'\'", "made_from": {}, "id": "1", "wall_s": 90}'
DAMAGED = ["{", "{}", '{"command": "c", "id": "", "made_from": {}, "wall_s": "long"}']


@pytest.mark.parametrize("content", [*DAMAGED, OLD])
def test_a_damaged_mark_is_no_mark_and_one_of_an_earlier_version_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.json").write_text(content)
    flow = Workflow(tmp_path, [Task(name="a", command=["-c", ""])])
    assert flow.wall_times_s() == ({"a": 90} if content == OLD else {})
    flow.run()
    assert flow.is_done("a") and (tmp_path / "logs" / "a.log").exists() == (content != OLD)


def test_too_little_disk_or_memory_is_said_before_anything_starts(tmp_path, monkeypatch) -> None:
    tasks = [Task(name="a", command=[], disk_gib=2), Task(name="b", command=[], memory_gib=6)]

    def check(disk: int, memory: int) -> None:
        monkeypatch.setattr("moelpr.base.machine.free_memory", lambda: memory << 30)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": disk << 30}))
        Workflow(tmp_path, tasks).check_machine()

    check(2, 6)
    with pytest.raises(MachineError, match=r"has 1 GiB free, .* need 2 GiB"):
        check(1, 6)
    with pytest.raises(MachineError, match=r"5 GiB of memory .* task b needs 6 GiB"):
        check(2, 5)


def test_the_outlook_is_what_a_run_does(tmp_path: Path, chain: Chain) -> None:
    def tasks(rate: str) -> list[Task]:
        train = tmp_path / "train"
        train = Task(name="train", command=[*count(train), rate], is_complete=train.is_file, continues=train)
        return [train, Task(name="export", command=count(tmp_path / "export"), made_from=("train",))]

    def states(rate: str) -> list[tuple[str, str]]:
        return [(x.state, x.reason) for x in Workflow(tmp_path, tasks(rate)).outlook()]

    assert states("1") == [("to do", ""), ("to do", "")]
    Workflow(tmp_path, tasks("1")).run()
    assert states("1") == [("done", ""), ("done", "")]
    assert states("2") == [("again", "its command has changed"), ("again", "train was made again")]
    assert "remove it to make it again" in Workflow(tmp_path, tasks("2")).outlook()[0].refusal
    Workflow(tmp_path, tasks("2"), redo=["train"]).run()
    assert (tmp_path / "train.before-1").read_text() == (tmp_path / "train").read_text() == "x"
    assert (tmp_path / "export").read_text() == "xx" and states("2") == [("done", ""), ("done", "")]


def test_a_training_that_is_done_again_takes_those_after_it_along(tmp_path: Path) -> None:
    """If it is stopped, the next run continues it, and is not asked for --redo again."""

    def go(rate: str, code: int = 0, redo: Iterable[str] = ()) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        train = Task(name="first", command=[*count(first, code), rate], is_complete=first.is_file, continues=first)
        review = Task(name="second", command=count(second), made_from=("first",), continues=second)
        Workflow(tmp_path, [train, review], redo=redo).run()

    go("1")
    with pytest.raises(StoppedError):
        go("2", STOPPED, redo=["first", "second"])
    assert (tmp_path / "second.before-1").is_file() and not (tmp_path / "second").exists()
    with pytest.raises(StoppedError):
        go("2", STOPPED)


def test_a_shared_task_is_made_once_by_workflows_that_run_at_the_same_time(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ["-c", f"import time; time.sleep(1); open({str(runs)!r}, 'a').write('x')"]
    flows = [Workflow(tmp_path / name, [Task(name="s", command=words, shared=tmp_path / "text")]) for name in "ab"]
    threads = [
        threading.Thread(target=flow._perform, args=(flow.tasks["s"],), kwargs={"needs_output": True}) for flow in flows
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs.read_text() == "x" and all(flow.is_done("s") for flow in flows)
    assert {path.name for path in (tmp_path / "text" / "logs").iterdir()} >= {"s.json", "s.log"}


def test_a_changed_sample_of_a_large_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelpr.project.workflow.mark._READ_WHOLE", 1 << 20)
    path = tmp_path / "text"
    path.write_bytes(bytes(1 << 23))
    before = fingerprint(path)
    with open(path, "r+b") as file:
        file.seek((1 << 23) - 1)
        file.write(b"x")
    assert fingerprint(path) != before


def test_a_changed_version_of_a_remote_file_is_a_reason_to_do_a_task_again(tmp_path: Path) -> None:
    def outlook(version: str) -> tuple[str, str]:
        task = Task(name="a", command=count(tmp_path / "a"), versions={"s3://bucket/a.parquet": version})
        (actual,) = (workflow := Workflow(tmp_path, [task])).outlook()
        workflow.run()
        return actual.state, actual.reason

    assert [outlook(version)[0] for version in ("9 x", "9 x", "9 y")] == ["to do", "done", "again"]
    assert "s3://bucket/a.parquet" in outlook("9 z")[1]


def test_a_node_of_a_cluster_does_one_task(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = [
        Task(name="a", command=count(tmp_path / "a")),
        Task(name="b", command=["-c", "print('hello');" + count(tmp_path / "b")[1]], made_from=("a",)),
    ]
    with pytest.raises(UserError, match="b requires a, which is not done"):
        Workflow(tmp_path, tasks).perform("b")
    Workflow(tmp_path, tasks).perform("a")
    Workflow(tmp_path, tasks).perform("b", is_leader=False)
    assert not Workflow(tmp_path, tasks).is_done("b")
    for _ in range(2):
        Workflow(tmp_path, tasks).perform("b")
        Workflow(tmp_path, tasks).perform("b", is_leader=False)
    assert (tmp_path / "b").read_text() == "xx" and "hello" in capfd.readouterr().out


@pytest.mark.parametrize(
    "handler, kind, message",
    [("lambda *_: sys.exit(3)", MachineError, "exited with"), ("0", StoppedError, "was stopped")],
)
def test_sigterm_reaches_the_command_and_starts_no_other(tmp_path: Path, handler, kind, message) -> None:
    program = f"import signal, sys, time; signal.signal(15, {handler}); print('up', flush=True); time.sleep(60)"
    tasks = [Task(name="a", command=["-c", program]), Task(name="b", command=count(tmp_path / "b"))]

    def stop() -> None:
        while "\nup" not in (log.read_text() if (log := tmp_path / "logs" / "a.log").is_file() else ""):
            time.sleep(0.05)
        os.kill(os.getpid(), 15)

    threading.Thread(target=stop).start()
    with pytest.raises(kind, match=f"task a {message}"):
        Workflow(tmp_path, tasks).run()
    assert not (tmp_path / "b").exists()


def test_a_changed_command_is_shown_by_its_flags() -> None:
    before = "moelpr train stage1 --lr 1e-3 --data-path 1 a 2 b --bf16 --seed 1"
    assert difference(before, before) == ""
    assert difference(before, before.replace("1e-3", "2e-3")) == " (--lr 2e-3, not 1e-3)"
    assert difference(before, before.replace(" --bf16", "")) == " (no --bf16)"
    assert difference(before, before + " --fp32") == " (--fp32)"
    assert (
        difference(before, "moelpr model export")
        == " (no --lr, not 1e-3; no --data-path, not 1 a 2 b; no --bf16; and 1 more)"
    )


def test_a_result_is_there_whenever_a_run_succeeds(tmp_path: Path) -> None:
    model, page, runs = tmp_path / "model", tmp_path / "page", tmp_path / "runs"
    write = (
        f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); open({str(runs)!r}, 'a').write('x')"
    )

    def workflow(text: str = "1", removed: Path | None = None) -> Workflow:
        remove = f"\npathlib.Path({str(removed)!r}).unlink()" if removed else ""
        command = ["-c", write + remove, page, text]
        return Workflow(
            tmp_path,
            [
                Task(name="m", command=["-c", write, model, text], is_complete=model.is_file, is_result=True),
                Task(name="p", command=command, is_complete=page.is_file, is_result=True, made_from=("m",)),
            ],
        )

    workflow().run()
    model.unlink()
    assert [outlook.state for outlook in workflow().outlook()] == ["again", "done"]
    workflow().run()
    assert model.read_text() == "1" and runs.read_text() == "xxx"
    with pytest.raises(MachineError, match="output of task m"):
        workflow("2", removed=model).run()
    page.unlink()
    workflow("2").run()
    assert model.is_file() and page.is_file()


def test_a_model_that_has_lost_a_file_is_made_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    code = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); path.parent.mkdir(exist_ok=True); path.touch()"
    command = ["-c", f"{code}; path.with_name('other.json').touch()", model / "one.json"]
    workflow = Workflow(tmp_path, [Task(name="m", command=command, model=model, is_result=True)])
    workflow.run()
    (model / "one.json").write_text("edited")
    assert workflow.outlook()[0].state == "done"
    (model / "other.json").unlink()
    assert workflow.outlook()[0].state == "again"
    workflow.run()
    assert (model / "other.json").is_file() and workflow.outlook()[0].state == "done"
