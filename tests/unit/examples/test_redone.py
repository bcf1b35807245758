"""The demo makes again whatever depends on an input that has changed, by commands whose flags exist."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from examples import demo
from examples.demo_tasks import ROOT
from moelpr.base.errors import UserError
from tests.unit.test_documentation import commands, flags_named

OUTPUTS = "FINISHED config.json model_spec.json results.json routing.json report.json report.html".split()
REPORT: dict[str, Any] = {"bits_per_byte": {}, "languages": {}}
CONFIG = Qwen2Config(num_hidden_layers=1, architectures=["Qwen2ForCausalLM"]).to_json_string()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were started, each replaced by one that writes a file into the folders it should write."""
    names: list[str] = []

    def execute(words: list[str], log: Path, environment: Any) -> int:
        names.append(log.stem)
        for name, flags in commands(f"```bash\n{shlex.join(words)}\n```"):
            assert not name or set(flags) <= flags_named(name), log.stem
        for flag, word in zip(words, words[1:], strict=False):
            if flag in ("--save", "--output"):
                Path(word).mkdir(parents=True, exist_ok=True)
                for name in OUTPUTS:
                    (Path(word) / name).write_text(CONFIG if name == "config.json" else json.dumps(REPORT))
            elif flag == "--output-prefix":
                Path(word).parent.mkdir(exist_ok=True)
                Path(f"{word}_text_document.manifest.json").touch()
        return 0

    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", execute)
    monkeypatch.chdir(ROOT)
    return names


def test_the_demo_redoes_what_depends_on_a_changed_text_recipe_or_seed(tmp_path, started, monkeypatch) -> None:
    recipes, run = shutil.copytree(ROOT / "launch/recipes", tmp_path / "recipes"), tmp_path / "run"
    monkeypatch.setattr("moelpr.train.arguments.recipes.launch_folder", lambda: tmp_path)

    def starts(*arguments: object) -> list[str]:
        before = len(started)
        monkeypatch.setattr(sys, "argv", ["command", "--run", str(run), *map(str, arguments)])
        demo.main()
        return started[before:]

    everything = starts()
    assert starts() == []
    (run / "corpus" / "validation.el.jsonl").write_text("changed")
    assert starts() == ["evaluate", "evaluate-routing", "report"]
    with (recipes / "demo-stage2.yaml").open("a") as recipe:
        recipe.write("# changed\n")
    with pytest.raises(UserError, match="continue .*/stage2, which was made before: .*demo-stage2.yaml has changed"):
        starts()
    shutil.rmtree(run / "stage2")
    assert starts() == everything[everything.index("stage2") :]
    before = len(started)
    for stage in ("stage1", "stage2"):
        with pytest.raises(UserError, match=f"continue .*/{stage}, which was made before: .*; remove it"):
            starts("--seed", 2)
        shutil.rmtree(run / stage)
    starts("--seed", 2)
    assert started[before:] == everything[everything.index("convert") :]


def test_scripts_that_are_run_by_their_path_do_not_import_the_examples(tmp_path: Path) -> None:
    """Python then looks for modules in the script's folder, so the package `examples` is not found."""
    tasks = [*demo.data(tmp_path, None), *demo.base(tmp_path)]
    commands = [task.words()[0] for task in tasks if not callable(task.command)]
    scripts = {ROOT / script for script in commands if script.startswith("examples/")}
    assert scripts and not [path for path in scripts if "from examples" in path.read_text()]
