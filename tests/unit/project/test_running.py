"""A mistake that can be known before anything runs is an error then, with its key; nothing is computed."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from moelpr.base.errors import UserError
from moelpr.base.files import locked
from moelpr.base.settings import parse
from moelpr.project import running, tables
from moelpr.project.budget import check_budget
from moelpr.project.commands import Run
from moelpr.project.project import Language
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.toy import write_toy
from moelpr.project.workflow.workflow import Outlook, Workflow
from tests.support.manifests import write_manifest
from tests.unit.project.conftest import Write, write_findings


@pytest.fixture(autouse=True)
def tokenizer_of_the_base(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file has 10,000 tokens."""
    Path("base/tokenizer.json").touch()

    def estimate(files: list[Path], *_: Any) -> Any:
        return type("Estimate", (), {"tokens": 10_000 * len(files)})

    monkeypatch.setattr("moelpr.project.budget.estimate", estimate)


SMALL: dict[str, Any] = {"hardware": {"gpu": "none"}, "budget": {"tokens": "6K"}}
SMALL |= {"steps": {"stage1": {"global-batch-size": 2, "micro-batch-size": 2}, "stage2": {"global-batch-size": 16}}}


def run(path: Path) -> None:
    running.run_here(ResolvedProject(read_project(path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"tokens": 100}}, r"line \d+: budget: 100 tokens, .* step of stage1, 524,288 .* it or add text$"),
        ({"budget": {"tokens": "90M"}}, r"line \d+: budget: 90M tokens would read the text more often than max_epochs"),
        (
            {"budget": {"epochs": 1}, "hardware": {"gpu": "h100-80", "gpus": 8}},
            r"budget: 24,000 tokens, the most .* one step of stage1, 524,288 .* \{global-batch-size: 8, micro-",
        ),
        (SMALL | {"budget": {"epochs": 5}}, r"max_epochs of .*; the longest is budget: {epochs: 4}"),
        ({"budget": {"hours": 1}}, r"line \d+: budget.hours requires GPUs whose speed is predicted"),
        ({"steps": {"stage1": {"lrr": 1}}}, r"line \d+: steps.stage1.lrr is no flag of this step; did you mean lr\?"),
        ({"steps": {"preprocess": {"worker": 1}}}, r"steps.preprocess.worker is no flag .* workers"),
        ({"steps": {"stage1": {"learning-rate": 1}}}, r"learning-rate is no flag of this step; did you mean lr\?"),
        ({"model": "owner/name"}, "there is no folder owner/name, "),
        ({"hardware": 4090}, r"line \d+: hardware.gpu: 4090 is unknown; did you mean rtx4090-24"),
        ({"hardware": {"gpu": "h100"}}, r"line \d+: hardware.gpu h100 is unknown; did you mean h100-80"),
        ({"budget": {"tokens": "2M"}, "mix": {"replay": 0.99}}, r"line \d+: mix.replay: "),
        ({"hardware": {"gpu": "a100-40", "gpus": 8, "gpus_per_node": 3}}, r"line \d+: hardware.gpus .* 8; .* 6 or 9"),
        ({"hardware": {"gpu": "rtx4090-24", "gpus": 1}, "experts": {"new": 16}}, r"line \d+: stage.: no layout fits"),
        (
            SMALL | {"method": "auto", "experts": None, "steps": {"stage2": {"global-batch-size": 8}}},
            r"line \d+: stage2: steps.stage2.global-batch-size: 8 is not a multiple of",
        ),
        (SMALL | {"steps": {"stage1": SMALL["steps"]["stage1"]}}, "replay.epochs: .* than one step of stage2"),
        (SMALL | {"benchmarks": {}}, "lm_eval is not installed; run "),
        (SMALL | {"trackers": {"mlflow_experiment": "x"}}, "mlflow is not installed; run "),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(write: Write, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(write(**changes))
    assert not Path("out").exists()


@pytest.mark.parametrize(("tokens", "works"), [("80K", True), ("95K", True), ("97K", False)])
def test_plan_and_run_refuse_a_budget_at_the_same_size_and_name_the_estimate(write: Write, tokens, works) -> None:
    """Two texts of 10,000 tokens each, read four times: 80K, and a fifth more because the estimate may be too low."""
    path = write(
        budget={"tokens": tokens},
        steps={"stage1": {"global-batch-size": 1, "micro-batch-size": 1}, "stage2": {"global-batch-size": 16}},
        hardware={"gpu": "none"},
    )
    if works:
        assert "Fits: yes" in tables.plan(ResolvedProject(read_project(path)))
        return check_budget(ResolvedProject(read_project(path)))
    for refuses in (tables.plan, check_budget):
        with pytest.raises(UserError, match=rf"{tokens} tokens would read .* more often .* \(80K tokens\)"):
            refuses(ResolvedProject(read_project(path)))


@pytest.mark.parametrize(("tokens", "works"), [("500K", True), ("700K", False)])
def test_sizes_of_files_may_mean_six_times_the_tokens_before_the_base_is_there(write: Write, tokens, works) -> None:
    """Parquet is compressed: two files of 100,000 bytes are 50,000 tokens or up to 300,000; each is read twice here."""
    Path("base/tokenizer.json").unlink()
    for code in ("el", "hu"):
        Path(f"{code}.jsonl").write_text(f'{{"text": "{87 * "x"}"}}\n' * 1000)
    texts = {code: {"text": f"{code}.jsonl", "max_epochs": 2} for code in ("el", "hu")}
    batch = {"stage1": {"global-batch-size": 1, "micro-batch-size": 1}}
    languages = {"expanded": texts, "original": {"en": "en.jsonl"}}
    path = write(budget={"tokens": tokens}, languages=languages, steps=batch, hardware={"gpu": "none"})
    project = ResolvedProject(read_project(path))
    if works:
        return check_budget(project)
    with pytest.raises(UserError, match="more often than max_epochs"):
        check_budget(project)


def test_two_runs_of_one_output_and_an_edit_during_a_run_are_errors(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {"stage1": {"global-batch-size": 2, "micro-batch-size": 2}, "stage2": {"global-batch-size": 16}}
    path = write(steps=batch)
    Path("out").mkdir()
    with locked(Path("out/.lock"), "out"), pytest.raises(UserError, match="another process is writing out"):
        run(path)

    def execute(words: list[str], *_: Any) -> int:
        prefix = words[words.index("--output-prefix") + 1]
        for corpus in (f"{prefix}_text_document", f"{prefix}_validation_text_document"):
            write_manifest(Path(corpus), 9)
            for suffix in ("bin", "idx", "lang"):
                Path(f"{corpus}.{suffix}").write_text("1")
        write(steps=batch, held_out=7)
        return 0

    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", execute)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} was edited after this run started"):
        run(path)
    assert [mark.name for mark in Path("out/logs").glob("*.json")] == ["preprocess-el.json"]


def test_a_cluster_needs_hardware_with_a_name(write: Write) -> None:
    with pytest.raises(
        UserError, match="languages.yaml: hardware.gpu is auto, which is this machine; name the cluster's"
    ):
        running.submit(ResolvedProject(read_project(write())), "slurm", render_only=True)
    with pytest.raises(UserError, match=r"line \d+: hardware.gpus is missing.* such as gpus: 8"):
        running.submit(ResolvedProject(read_project(write(hardware="h100-80"))), "slurm", render_only=True)


def test_a_finished_project_needs_no_place_to_write(write: Write, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(Workflow, "outlook", lambda flow: [Outlook(task, "done") for task in flow.tasks.values()])
    monkeypatch.setattr(running, "verdict", lambda project: "the verdict")
    monkeypatch.setattr(running, "check_budget", lambda project: None)
    running.run_here(ResolvedProject(read_project(write())))
    printed = capsys.readouterr().out
    assert "export: already done" in printed and "the verdict" in printed and not Path("out").exists()


def test_jobs_are_ready_for_a_review_though_the_routers_before_needed_none(write: Write) -> None:
    write_findings(distance=0.09, kept=0.9)  # routers before the ones to be made
    steps = {"ffn": {"global-batch-size": 1, "micro-batch-size": 1}, "stage2": {"global-batch-size": 16}}
    path = write(method="auto", experts=None, budget={"tokens": "20K"}, steps=steps, hardware={"gpu": "none"})
    running.submit(ResolvedProject(read_project(path)), "slurm", render_only=True)
    script = Path("out/slurm/stage2.sbatch").read_text()
    assert "--task stage2" in script and script.index("IS_SPARE=yes\n") < script.index("run_training ")


@pytest.mark.parametrize(("on", "message"), [("kubernetes", "l: kubernetes.image is miss"), ("skypilot", "volumes")])
def test_what_a_cluster_needs_is_checked_before_anything_is_planned(write: Write, on: str, message: str) -> None:
    project = ResolvedProject(read_project(write(hardware={"gpu": "h100-80", "gpus": 8}, budget={"tokens": 1})))
    with pytest.raises(UserError, match=message):
        running.submit(project, on, render_only=True)


def test_the_program_of_a_cluster_is_looked_for_before_anything_is_planned(write: Write, monkeypatch) -> None:
    settings: dict[str, Any] = {"kubernetes": {"image": "i", "claim": "c"}, "skypilot": {"volumes": {"/work": "v"}}}
    project = ResolvedProject(read_project(write(hardware={"gpu": "none"}, budget={"tokens": 1}, **settings)))
    monkeypatch.setenv("PATH", "/nowhere")
    for on, program in (("slurm", "sbatch"), ("kubernetes", "kubectl"), ("skypilot", "sky")):
        with pytest.raises(UserError, match=f"{program} is not installed; .*--render-only"):
            running.submit(project, on)


def test_benchmarks_of_jobs_with_this_python_need_their_package_here(write: Write, monkeypatch) -> None:
    """In a container, they have another."""
    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr(running, "checked", lambda *_: (None, []))
    monkeypatch.setattr(running, "_locked_folder", Mock(side_effect=InterruptedError))
    for slurm, error in (({}, UserError), ({"container_image": "i"}, InterruptedError)):
        project = ResolvedProject(read_project(write(**SMALL, benchmarks={}, slurm=slurm)))
        with pytest.raises(error):
            running.submit(project, "slurm")


def test_a_login_node_fetches_the_chat_model_and_names_text_that_nodes_read(monkeypatch, capsys) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(running, "download", lambda name, *_: fetched.append(name))
    monkeypatch.setattr(Workflow, "run", lambda *_: None)
    project: Any = SimpleNamespace(
        content=SimpleNamespace(chat="owner/chat"), languages={"el": Language(text=["el.jsonl", "s3://bucket/el"])}
    )
    running._fetch(project, Workflow(Path("out"), []))
    assert fetched == ["owner/chat"] and "s3://bucket/el" in capsys.readouterr().err


def test_a_demo_leaves_other_files_alone(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    file = folder / "languages.yaml"
    file.write_text("model: mine\n")
    with pytest.raises(UserError, match="--output"):
        write_toy(folder)
    file.write_text(edited := f"model: {folder}/base\nbudget: {{tokens: 1}}\n")
    assert write_toy(folder).read_text() == edited and [*folder.iterdir()] == [file]


def test_a_step_on_a_node_is_no_dry_run() -> None:
    with pytest.raises(UserError, match="not allowed with"):
        parse(Run, ["--task", "ffn", "--dry-run"])


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"copies": 3}, "experts.copies must be at most experts.topk, got 3 and 2"),
        (
            {"topk": 4, "copies": 1, "new": 2},
            "top-4 routing is impossible with 3 experts .* experts.topk between 1 and 3",
        ),
        ({"every_k_layers": 99}, "experts.every_k_layers must be 1 to 24 .*, got 99"),
    ],
)
def test_experts_that_the_base_cannot_have_are_refused_on_a_cpu_too(write: Write, experts: Any, message: str) -> None:
    path = write(experts=experts, hardware={"gpu": "none"})
    with pytest.raises(UserError, match=rf"languages.yaml, line \d+: {message}"):
        check_budget(ResolvedProject(read_project(path)))


@pytest.mark.parametrize("command", ["plan", "status"])
def test_the_time_of_importing_torch_is_not_in_a_plan(write: Write, command: str) -> None:
    path = write(
        hardware={"gpu": "h100-80", "gpus": 8},
        budget={"tokens": "6K"},
        steps={"stage1": {"global-batch-size": 8, "seq-length": 64}, "stage2": {"global-batch-size": 8}},
    )
    Path("base/tokenizer.json").unlink()
    words = [sys.executable, "-X", "importtime", "-m", "moelpr", command, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "stage1" in done.stdout and " transformers\n" in done.stderr and " torch._C" not in done.stderr
