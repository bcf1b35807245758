"""The demo makes again whatever depends on an input that has changed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import demo
from examples.demo_tasks import ROOT
from moelpr.base.errors import UserError

OUTPUTS = "FINISHED config.json model_spec.json results.json routing.json report.json report.html".split()
REPORT = {"bits_per_byte": {}, "languages": {}, "checks": {}}


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


def test_scripts_that_are_run_by_their_path_do_not_import_the_examples(tmp_path: Path) -> None:
    """Python then looks for modules in the script's folder, so the package `examples` is not found."""
    tasks = [*demo.data(tmp_path, None), *demo.base(tmp_path)]
    commands = [task.words()[0] for task in tasks if not callable(task.command)]
    scripts = {ROOT / script for script in commands if script.startswith("examples/")}
    assert scripts and not [path for path in scripts if "from examples" in path.read_text()]
