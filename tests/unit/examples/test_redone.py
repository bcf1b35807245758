"""What was made from something is made again when that was made again: in the demo, the frontier and the real model."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples import demo, frontier
from examples.real_model.queue import Queue
from examples.tasks import ROOT
from moelpr.base.errors import UserError
from moelpr.project.workflow.workflow import Workflow

OUTPUTS = "FINISHED config.json model_spec.json results.json routing.json corpus.json report.json report.html".split()
REPORT = {"bits_per_byte": {}, "languages": {}, "title": "", "claims": []}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were started, each replaced by one that writes a file into the folders it should write."""
    names: list[str] = []

    def execute(words: list[str], log: Path, environment: Any) -> int:
        names.append(log.stem)
        for flag, word in zip(words, words[1:], strict=False):
            if flag in ("--save", "--output"):
                Path(word).mkdir(parents=True, exist_ok=True)
                for name in OUTPUTS:
                    (Path(word) / name).write_text(json.dumps(REPORT))
            elif flag == "--output-prefix":
                Path(word).parent.mkdir(exist_ok=True)
                Path(f"{word}_text_document.manifest.json").touch()
        return 0

    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", execute)
    monkeypatch.setattr(frontier, "write_results", lambda *_: None)
    monkeypatch.chdir(ROOT)
    return names


def starts(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


def test_another_seed_of_the_demo_redoes_all_that_depends_on_it(tmp_path, started, monkeypatch) -> None:
    starts(monkeypatch, demo.main, "--run", tmp_path)
    everything = [*started]
    starts(monkeypatch, demo.main, "--run", tmp_path)
    assert started == everything  # all is done
    started.clear()
    for stage in ("stage1", "stage2"):
        with pytest.raises(UserError, match=f"continue .*/{stage}, but .*; remove it"):
            starts(monkeypatch, demo.main, "--run", tmp_path, "--seed", 2)
        shutil.rmtree(tmp_path / stage)
    starts(monkeypatch, demo.main, "--run", tmp_path, "--seed", 2)
    assert started == everything[everything.index("convert") :]


def test_a_changed_recipe_or_held_out_text_redoes_what_reads_it(tmp_path, started, monkeypatch) -> None:
    recipes = shutil.copytree(ROOT / "launch/recipes", tmp_path / "recipes")
    monkeypatch.setattr("moelpr.train.arguments.recipes.launch_folder", lambda: tmp_path)
    run = tmp_path / "run"
    starts(monkeypatch, demo.main, "--run", run)
    everything = [*started]
    started.clear()
    (run / "corpus" / "validation.el.jsonl").write_text("changed")
    starts(monkeypatch, demo.main, "--run", run)
    assert started == ["evaluate", "evaluate-routing", "report"]
    started.clear()
    (recipes / "demo-stage2.yaml").write_text("changed")
    with pytest.raises(UserError, match="continue .*/stage2, but .*demo-stage2.yaml has changed"):
        starts(monkeypatch, demo.main, "--run", run)
    shutil.rmtree(run / "stage2")
    starts(monkeypatch, demo.main, "--run", run)
    assert started == everything[everything.index("stage2") :]


def test_another_base_of_the_demo_redoes_the_frontier(tmp_path, started, monkeypatch) -> None:
    base, run = tmp_path / "demo", tmp_path / "run"
    (base / "logs").mkdir(parents=True)
    (base / "logs" / "export-base.json").write_text("{}")
    (base / "base-hf").mkdir()
    (base / "base-hf" / "model.safetensors").write_text("1")
    arguments = ("--demo", base, "--run", run, "--seeds", 1, "--settings", "1-copy-gamma-0.1")
    starts(monkeypatch, frontier.main, *arguments)
    everything = [*started]
    starts(monkeypatch, frontier.main, *arguments)
    assert sorted(started) == sorted(everything)  # two at a time
    started.clear()
    (base / "base-hf" / "model.safetensors").write_text("2")
    for stage in ("stage1-1-seed-1", "1-copy-gamma-0.1-seed-1"):
        with pytest.raises(UserError, match=f"continue .*/{stage}, but "):
            starts(monkeypatch, frontier.main, *arguments)
        shutil.rmtree(run / stage)
    starts(monkeypatch, frontier.main, *arguments)
    assert sorted(started) == sorted(everything)  # two at a time


def test_other_sources_redo_the_real_models_text_and_what_was_made_of_it(tmp_path, started, monkeypatch) -> None:
    sources = tmp_path / "sources.yaml"
    sources.write_text("")
    monkeypatch.setattr("examples.real_model.task_maker.SOURCES", sources)
    tasks = [replace(task, is_complete=lambda: True) for task in Queue(tmp_path).tasks()]
    tasks = [task for task in tasks if task.name in ("base", "text", "split", "unseen")]
    Workflow(tmp_path, tasks).run()
    Workflow(tmp_path, tasks).run()
    everything = [task.name for task in tasks]
    assert started == everything
    sources.write_text("changed")
    Workflow(tmp_path, tasks).run()
    assert started == 2 * everything
    # They must not keep what they find.
    assert all("--overwrite" in task.words() for task in tasks[:4])


def test_scripts_that_are_run_by_their_path_do_not_import_the_examples(tmp_path: Path) -> None:
    """Python then looks for modules in the script's folder, so the package `examples` is not found."""
    tasks = [*demo.data(tmp_path, None), *demo.base(tmp_path), *Queue(tmp_path).tasks()]
    commands = [task.words()[0] for task in tasks if not callable(task.command)]
    scripts = {ROOT / script for script in commands if script.startswith("examples/")}
    assert scripts and not [path for path in scripts if "from examples" in path.read_text()]
