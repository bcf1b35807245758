"""The ways of a user: the base is a name on the Hub, nothing has been made yet, and a dry run stays dry."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moelpr.base.errors import UserError
from moelpr.project.running import SUBMIT
from tests.support.commands import moelpr
from tests.support.local_hub import LocalHub, local_hub
from tests.support.model_shapes import SHAPES, save_config
from tests.support.plan_pages import MORE, ROOT, make_text
from tests.support.programs import put_on_path
from tests.unit.project.conftest import Write

FILES = [ROOT / "examples" / "languages.yaml", *sorted((ROOT / "examples" / "users").glob("*.yaml"))]
ONE_GPU = ROOT / "examples" / "users" / "one-gpu.yaml"
# Keys of languages.yaml that a cluster requires.
REQUIRED = {
    "kubernetes": {"image": "registry/moelpr", "claim": "moelpr"},
    "skypilot": {"gpu": "H100", "volumes": {"/work": "moelpr"}},
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs of clusters, which do nothing else, and a step that is started leave a line."""
    called = tmp_path / "calls"
    answers = {"sbatch": "echo 1", "squeue": "", "kubectl": "", "sky": ""}
    bodies = {name: f'echo {name} "$@" >>{called}\n{answer}' for name, answer in answers.items()}
    put_on_path(monkeypatch, tmp_path / "bin", bodies)

    def execute(words: list[str], *_: object) -> int:
        called.write_text(" ".join(words))
        return 0

    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", execute)
    return called


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("file", "revision"), [*((file, "") for file in FILES), (ONE_GPU, "@v1.0")], ids=lambda value: Path(value).name
)
def test_a_name_on_the_hub_is_all_that_a_plan_and_the_jobs_need_of_the_base(
    file, revision, hub, calls, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(file.read_text())
    model, output = content["model"], Path(content["output"])
    for name in filter(None, (model, content.get("chat"))):
        save_config(base if (base := f"{Path(name).name}-Base") in SHAPES else Path(name).name, tmp_path / name)
        hub.repositories[name] = {"config.json": (tmp_path / name / "config.json").read_bytes()}
        shutil.rmtree(tmp_path / name)
    hub.revisions |= {revision[1:] or "main"}
    path = Path(file.name)
    path.write_text(file.read_text().replace(model, model + revision, 1))
    make_text(path, MORE.get(file.relative_to(ROOT).as_posix(), 1))
    where = next((on for on in SUBMIT if on in content), "slurm")

    moelpr("plan", path)
    moelpr("run", path, "--dry-run")
    printed = capsys.readouterr().out
    assert model in printed
    assert "GiB" in printed and not output.exists()
    moelpr("run", path, "--on", where, "--render-only")
    rendered = [text for text in contents(output).values() if text]
    assert any(b"evaluate" in text for text in rendered)
    assert not (output / "base").exists() and not calls.exists()
    assert f"GET /api/models/{model}/revision/{revision[1:] or 'main'}" in hub.asked and hub.downloads == {
        "config.json"
    }


@pytest.mark.parametrize("on", ["local", *SUBMIT])
def test_a_dry_run_starts_submits_and_writes_nothing(
    on: str, write: Write, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        hardware={"gpu": "none"},
        budget={"tokens": "6K"},
        steps={"stage1": {"global-batch-size": 2, "micro-batch-size": 2}, "stage2": {"global-batch-size": 16}},
    )
    path.write_text(path.read_text() + yaml.safe_dump(REQUIRED))
    Path("out").mkdir()
    before = contents(path.parent)
    moelpr("run", path, "--on", on, "--dry-run")
    assert "stage2: to do\n    moelpr train stage2 --recipe paper-stage2" in capsys.readouterr().out
    moelpr("run", path, "--on", on, "--dry-run", *(["--render-only"] if on != "local" else []))
    assert contents(path.parent) == before and not calls.exists()
    if on != "local":  # the stubs see a job that is submitted
        moelpr("run", path, "--on", on, "--render-only")
        assert contents(path.parent) != before and not calls.exists()
        moelpr("run", path, "--on", on)
        assert calls.exists()


@pytest.mark.parametrize(
    ("step", "flag", "value", "message"),
    [
        ("stage1", "lrr", 1, " is no flag of this step; did you mean lr"),
        ("stage1", "lr", "high", ": must be at least 0, got high"),
        ("stage1", "lr", True, ": expected one argument"),
        ("stage1", "seq-length", 0, ": must be at least 1, got 0"),
        ("stage1", "micro-batch-size", 1.5, ": must be at least 1, got 1.5"),
        ("stage1", "seed", [1, 2], r": must be one value, got \[1, 2\]"),
        ("stage1", "bf16", "yes please", ": must be true or false, got yes please"),
        ("stage1", "optimizer", "adan", ": invalid choice: 'adan'"),
        ("stage1", "lpr-loss-coeff", -1, ": must be at least 0, got -1"),
        ("convert", "seed", "x", ": invalid int value: 'x'"),
        ("preprocess", "workers", 0, ": must be at least 1, got 0"),
    ],
)
def test_a_plan_refuses_what_a_step_does_not_take(write: Write, step: str, flag: str, value, message: str) -> None:
    with pytest.raises(UserError, match=rf"line \d+: steps.{step}.{flag}{message}"):
        moelpr("plan", write(steps={step: {flag: value}}))


def test_files_of_jobs_are_for_a_cluster(write: Write, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        hardware={"gpu": "none"},
        budget={"tokens": "6K"},
        steps={"stage1": {"global-batch-size": 2, "micro-batch-size": 2}},
    )
    with pytest.raises(UserError, match=r"--on slurm\|"):
        moelpr("run", path, "--render-only")
    assert not calls.exists() and not Path("out").exists()
