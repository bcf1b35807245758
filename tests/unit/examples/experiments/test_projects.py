"""The experiments: each file plans and lists its commands, and those of a base can be compared."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.demo_tasks import ROOT
from examples.experiments import __main__ as experiments
from examples.experiments.flores import write_flores
from examples.experiments.text import PLAIN, UNSEEN
from examples.languages import LANGUAGES
from moelpr.base.errors import UserError
from moelpr.project.compare import read_texts
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from tests.support.commands import moelpr
from tests.support.model_shapes import save_config

FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / experiments.FILES).rglob("*.yaml"))
PROJECTS = [file for file in FILES if not file.endswith("recipe.yaml")]
TOKENS = 112_640  # each setting reads so many


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the files, bases that are only shapes, and text of one sentence."""
    shutil.copytree(ROOT / experiments.FILES, tmp_path / experiments.FILES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    for base in ("base", "second-base/hf"):
        save_config("SmolLM2-135M", experiments.RUNS / base)
    texts = {"train": LANGUAGES, "interface": (*LANGUAGES, *UNSEEN), "plain": (*PLAIN, "code")}
    names = [f"text/{kind}.{language}" for kind, languages in texts.items() for language in languages]
    for name in (*names, "text/code", "text/sums", "kept/sv"):
        path = experiments.RUNS / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(10_000 * (json.dumps({"text": f"a sentence of {name}"}) + "\n"))
    return tmp_path


@pytest.mark.parametrize("file", PROJECTS)
def test_a_project_plans_and_lists_its_commands(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {*folder.rglob("*")}
    moelpr("plan", file)
    steps = re.findall(r"^(\S+) +to do", capsys.readouterr().out, re.MULTILINE)
    method = read_project(Path(file)).project.method
    assert {"moe-lpr": "stage1", "full": "dense", "second-ffn": "ffn"}.get(method, method) in steps
    moelpr("run", file, "--dry-run")
    assert re.findall(r"^(\S+): to do", capsys.readouterr().out, re.MULTILINE) == steps
    assert {*folder.rglob("*")} == before


def test_all_settings_read_as_many_tokens(folder: Path) -> None:
    for file in PROJECTS:
        if "second-base" not in file:
            project = read_project(Path(file)).project
            review = project.steps.get("stage2", {}).get("train-iters", 0)
            assert (project.budget.tokens or 0) + 1024 * int(str(review)) == TOKENS


@pytest.mark.parametrize("base", experiments.BASES)
def test_projects_of_a_base_share_base_and_text(base: str, folder: Path) -> None:
    projects = {file: ResolvedProject(read_project(Path(file))) for file in PROJECTS if f"/{base}/" in file}
    assert len({(places.base, places.text) for places in projects.values()}) == 1
    assert len({places.folder for places in projects.values()}) == len(projects) > 4
    _, groups = read_texts(projects, {}, "text", 3)
    assert groups["expanded"] == ["el", "hu", "tr"] and groups["kept"] == ["en", "es", "zh", "sv"]


def run(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[list[str]]:
    """The commands that the experiments start; a comparison writes numbers."""
    started: list[list[str]] = []
    changes = {"el": -0.125, "jv": 0.0125} | dict.fromkeys(experiments.RELATIVES, 0.03)
    languages = {
        text: {"change": {"bits_per_byte": {"value": change}}, "distance": {"value": 0.5}}
        for text, change in changes.items()
    }

    def execute(words: list[str]) -> Any:
        started.append(words[2:])
        if "compare" in words:
            output = Path(words[words.index("--output") + 1])
            output.mkdir(parents=True, exist_ok=True)
            interval = {"value": -0.25, "low": -0.3, "high": -0.2}
            means = dict.fromkeys(experiments.GROUPS, {"change": interval, "distance": interval})
            (output / "compare.json").write_text(json.dumps({"projects": {"lora": {"means": means}}}))
        if "evaluate" in words:
            output = Path(words[words.index("--output") + 1])
            output.mkdir(parents=True)
            models = {
                "base": {},
                "lora": {
                    "languages": languages,
                    "means": {f"mean {group}": languages["el"] for group in ("original", "expanded")},
                },
            }
            (output / "results.json").write_text(json.dumps({"models": models}))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", execute)
    monkeypatch.setattr(sys, "argv", ["experiments", *names])
    experiments.main()
    return started


def test_the_second_base_is_made_before_what_starts_from_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = run(monkeypatch)
    runs = [words[2] for words in started if words[:2] == ["moelpr", "run"]]
    assert sorted(runs) == PROJECTS
    assert runs.index("examples/experiments/second-base.yaml") == min(
        place for place, file in enumerate(runs) if "experiments/second" in file
    )
    assert not [words for words in started if words[0] != "moelpr"]  # base and text are there
    shutil.rmtree(experiments.RUNS / "kept")
    first = run(monkeypatch, "lora")[0]
    assert first[:3] == ["examples.other_text", "--without", ",".join(UNSEEN)]


def test_the_page_has_a_table_of_each_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = run(monkeypatch, "lora")
    compared = [words[2:3] for words in started if words[1] == "compare"]
    assert compared == [[f"examples/experiments/{base}/lora.yaml"] for base in experiments.BASES]
    page = (experiments.RUNS / "results.md").read_text()
    assert page.count("| lora") == page.count("compare.svg)") == 2 and "−25.0% [−30.0%, −20.0%]" in page
    with pytest.raises(UserError, match=r"there is no nothing\.yaml"):
        run(monkeypatch, "nothing")


def test_the_page_has_a_table_of_all_languages_if_flores_is_there(folder: Path, tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "flores101"
    (source / "dev").mkdir(parents=True)
    for code in ("ell", "jav"):
        (source / "dev" / f"{code}.dev").write_text(f"{code} 0\n{code} 1\n{code} 2\n{code} 3\n")
    started = run(monkeypatch, "lora", "--flores", str(source))
    greek = (experiments.RUNS / "flores/flores.el.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in greek] == ["ell 1", "ell 3"]
    evaluated = [words for words in started if "evaluate" in words]
    assert [words[words.index("--original-languages") + 1] for words in evaluated] == ["jv", "jv"]
    of_lora = [row for row in (experiments.RUNS / "results.md").read_text().splitlines() if row.startswith("| lora")]
    assert len([row for row in of_lora if "−12.5%" in row and "0.500" in row and "Finnish +3.0%" in row]) == 2
    (source / "dev/jav.dev").write_text("one line\n")
    with pytest.raises(UserError, match="other lengths"):
        write_flores(source, tmp_path / "out")
    with pytest.raises(UserError, match="no files"):
        write_flores(tmp_path, tmp_path / "out")
