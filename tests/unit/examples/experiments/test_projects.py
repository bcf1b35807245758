"""The experiments: each file plans and lists its commands, and those of a base can be compared."""

import json
import re
import shutil
import sys
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.demo_tasks import ROOT
from examples.experiments import __main__ as experiments
from examples.experiments import routers
from examples.experiments.parts import SWITCHED
from examples.experiments.text import NEAR, PLAIN, UNSEEN
from examples.languages import EXPANDED, LANGUAGES, ORIGINAL
from moelpr.base.errors import UserError
from moelpr.project.compare import read_texts
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from tests.support.commands import moelpr
from tests.support.model_shapes import save_config

FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / experiments.FILES).rglob("*.yaml"))
PROJECTS = [file for file in FILES if not file.endswith("recipe.yaml")]
PACK = re.findall(r"text: \S+/kept/(\w+)", (ROOT / experiments.FILES / "first/full-pack.yaml").read_text())
TOKENS = 112_640  # each setting reads so many, of new text those with the pack


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the files, bases that are only shapes, and text of one sentence."""
    shutil.copytree(ROOT / experiments.FILES, tmp_path / experiments.FILES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    for base in ("base", "second-base/hf"):
        save_config("SmolLM2-135M", experiments.RUNS / base)
        (experiments.RUNS / base / "model.safetensors").touch()
    texts = {"train": (*LANGUAGES, *NEAR), "interface": (*LANGUAGES, *UNSEEN), "plain": (*PLAIN, "code")}
    names = [f"text/{kind}.{language}" for kind, languages in texts.items() for language in languages]
    for name in (*names, "text/code", *(f"kept/{name}" for name in PACK)):
        path = experiments.RUNS / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text((100 if "kept" in name else 10_000) * (json.dumps({"text": f"a sentence of {name}"}) + "\n"))
    return tmp_path


@pytest.mark.parametrize("file", PROJECTS)
def test_a_project_plans_and_lists_its_commands(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {*folder.rglob("*")}
    moelpr("plan", file)
    steps = re.findall(r"^(\S+) +to do", capsys.readouterr().out, re.MULTILINE)
    method = "lora" if "rank-" in file else read_project(Path(file)).project.method
    stage = {"moe-lpr": "stage1", "full": "dense", "second-ffn": "ffn"}.get(method, method)
    assert stage in {step.partition("-")[0] for step in steps}
    moelpr("run", file, "--dry-run")
    assert re.findall(r"^(\S+): to do", capsys.readouterr().out, re.MULTILINE) == steps
    assert {*folder.rglob("*")} == before


def test_all_settings_read_as_many_tokens(folder: Path) -> None:
    for file in PROJECTS:
        if "second-base" not in file:
            project = read_project(Path(file)).project
            review = int(str(project.steps.get("stage2", {}).get("train-iters", 0)))
            share = 3 if "apart" in file else 1 - project.mix.replay if "pack" in file else 1
            wanted = {"equal-time": 1024 * round(138 * 7.66 / 6.76), "apart": 1024 * 36 * 3}  # by the seconds of a step
            tokens = share * (project.budget.tokens or 0) / (4 if "longer" in file else 1)
            assert tokens + 1024 * review == wanted.get(Path(file).stem, TOKENS)


@pytest.mark.parametrize("base", experiments.BASES)
def test_projects_of_a_base_share_base_and_text(base: str, folder: Path) -> None:
    projects = {file: ResolvedProject(read_project(Path(file))) for file in PROJECTS if f"/{base}/" in file}
    assert len({places.base for places in projects.values()}) == 1
    new = NEAR if base == "relatives" else EXPANDED
    for file, places in projects.items():  # corpora know their original languages
        assert [*places.expanded] == [*new] and not {*places.kept} & {*new}
        assert places.text == experiments.RUNS / base / ("pack" if "pack" in file else "")
    assert len({places.folder for places in projects.values()}) == len(projects) > 1
    if base != "relatives":
        _, groups = read_texts(projects, {}, "text", 3)
        assert groups["expanded"] == [*new] and sorted(groups["kept"]) == sorted([*ORIGINAL, *PACK])
        assert {*SWITCHED, "full-pack"} <= {Path(file).stem for file in projects}


def run(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[list[str]]:
    """The commands that the experiments start; a comparison writes a page, and measuring finds the same everywhere."""
    started: list[list[str]] = []

    def execute(words: list[str]) -> Any:
        started.append(words[2:])
        if "compare" in words:
            output = Path(words[words.index("--output") + 1])
            output.mkdir(parents=True, exist_ok=True)
            (output / "compare.md").write_text("# Learned and lost\n\n![Change](compare.svg)\n")
        return type("Done", (), {"returncode": 0})

    def measure(models: dict[str, Path], texts: dict[str, list[Any]], output: Path) -> Any:
        of = {text: {what: np.ones((len(its), 4)) for what, _ in its[0]} for text, its in texts.items()}
        return dict.fromkeys(models, of), dict.fromkeys(models, 7.0)

    monkeypatch.setattr("subprocess.run", execute)
    monkeypatch.setattr(experiments, "measure", measure)
    monkeypatch.setattr(experiments, "add_switches", lambda *_: None)
    monkeypatch.setattr(experiments, "write_mean", lambda base, tuned, output: output.mkdir())
    monkeypatch.setattr(sys, "argv", ["experiments", *names])
    experiments.main()
    return started


def test_the_second_base_is_made_before_what_starts_from_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved := experiments.RUNS / "second-base/dense/iter_0000220").mkdir(parents=True)
    started = run(monkeypatch)
    assert saved.parent.exists() and not saved.exists()
    runs = [words[2] for words in started if words[:2] == ["moelpr", "run"]]
    assert sorted({*runs}) == PROJECTS
    assert runs.index("examples/experiments/second-base.yaml") == min(
        place for place, file in enumerate(runs) if "experiments/second" in file
    )
    made = [words[0] for words in started if words[0] != "moelpr"]
    assert made == ["examples.experiments.routers"] * 8  # base and text are there
    shutil.rmtree(experiments.RUNS / "kept")
    first = run(monkeypatch, "lora")[0]
    assert first[:3] == ["examples.other_text", "--without", ",".join(UNSEEN)]


def test_other_routers_are_beside_ours_in_each_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, its = "examples/experiments/first/second-ffn.yaml", str(experiments.RUNS / "first/dume-routers.yaml")
    started = run(monkeypatch, "first/dume-routers", *flores(folder))
    assert started[0] == ["moelpr", "run", ours] and started[1] == ["examples.experiments.routers", ours, its]
    projects = [ResolvedProject(read_project(Path(file))) for file in (ours, its)]
    assert [one.export for one in projects] == [
        experiments.RUNS / f"first/{x}/hf" for x in ("second-ffn", "dume-routers")
    ]
    assert projects[0].kept == projects[1].kept and projects[0].base == projects[1].base
    page = (experiments.RUNS / "results.md").read_text()
    assert page.count("\n| second-ffn") == page.count("\n| dume-routers") == 1
    assert run(monkeypatch, "first/dume-routers")[2][:4] == ["moelpr", "compare", ours, its]


def test_each_seed_is_a_project_whose_training_alone_differs_and_a_table_has_one_row_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("first/full-pack", "first/lora-alone", "first/dume-routers")
    started = run(monkeypatch, *names, "--seeds", "2", *flores(folder))
    files = [words[2] for words in started if words[:2] == ["moelpr", "run"]]
    others = [words[1:] for words in started if "examples.experiments.routers" in words]
    assert len(files) == len({*files}) == 6 and files[4:] == [others[0][0], others[1][0]]
    assert others[1] == [str(experiments.RUNS / f"first/{name}-seed2.yaml") for name in ("second-ffn", "dume-routers")]
    for first, second in [*batched(files, 2), [one[1] for one in others]]:
        one, two = (read_project(Path(file)).project for file in (first, second))
        assert f"{one.output}-seed2" == str(two.output)
        seeds = [step["seed"] for step in two.steps.values() if "seed" in step]
        assert seeds == [2] and [*one.steps] == [*two.steps]
        assert one.languages == two.languages and one.text_output == two.text_output
    page = (experiments.RUNS / "results.md").read_text()
    rows = re.findall(r"^\| ([a-z][\w ,-]*?) +\|", page, re.MULTILINE)
    assert rows[1:] == ["full-pack", "lora-alone", "second-ffn", "dume-routers", "mean of base and full-pack"]
    assert "mean of base and full-pack-seed2 7" in page


def test_other_routers_get_the_ffns_and_texts_of_ours_and_no_model_is_made_twice(folder: Path, monkeypatch) -> None:
    ours, its, calls = Path("examples/experiments/first/second-ffn.yaml"), Path("dume-routers-seed2.yaml"), []
    its.write_text(ours.read_text().replace("/second-ffn\n", "/other\n"))

    def write(*words: Any) -> None:
        calls.append(words)
        words[-1].mkdir(parents=True)

    shown: list[Any] = []
    monkeypatch.setitem(experiments.ROUTERS, "dume-routers", write)
    monkeypatch.setattr(routers, "show", lambda *words: shown.append(words))
    monkeypatch.setattr(sys, "argv", ["routers", str(ours), str(its)])
    for _ in range(2):
        routers.main()
    [[*folders, kept, new, output]] = calls
    assert shown == [(folders[0], output, kept, new)]
    first = experiments.RUNS / "first"
    assert [*folders, output] == [experiments.RUNS / "base", first / "second-ffn/ffn-hf", first / "other/hf"]
    assert {*kept} == {"en", "es", "zh", *PACK} and {*new} == {"el", "hu", "tr"}
    assert {*kept["eu"], *kept["en"], *new["el"]} == {
        f"a sentence of {x}" for x in ("kept/eu", "text/train.en", "text/train.el")
    }


def flores(folder: Path) -> list[str]:
    (folder / "flores/dev").mkdir(parents=True)
    for code in ("eng", "ell", "hun", "tur", "jav"):
        (folder / "flores/dev" / f"{code}.dev").write_text("".join(f"{code} {n}\n" for n in range(997)))
    return ["--flores", "flores", "--table", "flores"]


def test_the_page_has_all_tables_of_each_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = run(monkeypatch, "lora")
    compared = [words[2:3] for words in started if words[1] == "compare"]
    assert compared == [[f"examples/experiments/{base}/lora.yaml"] for base in ("first", "second")]
    page = (experiments.RUNS / "results.md").read_text()
    assert page.count("### Learned") == page.count("](first/comparison/compare.svg)") + 1 == 2
    assert page.count("CPU minutes of training: lora 0.") == 2
    flags = [*flores(folder), "--table", "translation"]
    trained = [words[2] for words in run(monkeypatch, "first/full-pack", *flags) if "run" in words]
    assert trained == ["examples/experiments/first/full-pack.yaml"]
    page = (experiments.RUNS / "results.md").read_text()
    assert page.count("### Learned") == 2 and page.count("| mean of base and full-pack") == 2
    assert "CPU minutes of measuring: base 7, full-pack 7, mean of base and full-pack 7." in page
    for names, message in ((("nothing",), r"there is no nothing\.yaml"), (("--table", "mixed"), "--flores")):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *names)
